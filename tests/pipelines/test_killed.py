"""What a flow run survives, and what the next one takes over from it: killed workers, killed runs, vanished machines, servers that go away."""

import fcntl
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.footage import moving, write_video
from tests.pipelines.conftest import at_work as working
from tests.pipelines.conftest import working_on
from tests.same_training import assert_same_training
from vrt.services import local, process, servers

pytestmark = pytest.mark.long
ENDLESS = {"train.total_steps": 100_000}


@pytest.fixture
def worker(make_workspace):
    """A worker of the test's own: it won't live long."""
    with working(make_workspace("killed")) as worker:
        yield worker


def begun(worker, **parameters) -> str:
    """The id of a run that trains by now."""
    run = worker.start("train/vrt", retry_pause=0, **parameters)
    worker.wait_for("checkpoint 4 registered")
    return run


@contextmanager
def another(worker):
    """A new worker in the place of one that died."""
    with working_on(worker.workspace) as other:
        worker.process = other.process
        yield


def nothing_left(processes) -> None:
    _, alive = psutil.wait_procs(processes, timeout=90)
    assert not alive


def test_when_the_flow_is_killed_the_trainer_saves_and_ends_and_the_next_run_completes_it(worker, uninterrupted):
    run = begun(worker)
    everything = worker.process.children(recursive=True)
    (engine,) = (child for child in everything if "prefect.engine" in child.cmdline())
    mine = engine.children(recursive=True)
    engine.kill()
    nothing_left(mine)
    assert worker.settled(run).state_name == "Crashed"
    assert worker.settled(worker.start("train/vrt", retry_pause=0)).state_name == "Completed"
    assert_same_training(uninterrupted, worker.workspace)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_when_make_serve_loses_its_terminal_or_is_killed_no_worker_goes_on_taking_runs(worker, number: signal.Signals):
    run = begun(worker, overrides=ENDLESS)
    left = worker.process.children(recursive=True)
    worker.process.send_signal(number)
    nothing_left(left)
    assert worker.settled(run).state_name == "Crashed"


def test_when_the_worker_is_killed_everything_saves_and_ends_and_the_next_run_completes_it(worker, uninterrupted):
    run = begun(worker)
    everything = worker.process.children(recursive=True)
    (prefects,) = (child for child in worker.process.children() if "worker" in child.cmdline())
    prefects.kill()
    nothing_left([worker.process, *everything])
    assert worker.look(run).state_name == "Crashed"
    with another(worker):
        assert worker.settled(worker.start("train/vrt", retry_pause=0)).state_name == "Completed"
    assert_same_training(uninterrupted, worker.workspace)


def test_when_the_worker_is_killed_while_the_store_is_read_back_nothing_of_that_is_tried_again(worker):
    worker.start("train/vrt", retry_pause=0)
    worker.wait_for("$ vrt checkpoints verify")
    everything = worker.process.children(recursive=True)
    (prefects,) = (child for child in worker.process.children() if "worker" in child.cmdline())
    prefects.kill()
    nothing_left([worker.process, *everything])


def test_when_the_worker_is_killed_while_a_video_is_restored_that_ends_too_and_the_next_run_goes_on_with_it(worker):
    folder = worker.workspace.root
    write_video(folder / "long.mp4", moving(200, 64, 64))
    assert worker.settled(worker.start("train/vrt", retry_pause=0)).state_name == "Completed"
    places = {"input": str(folder / "long.mp4"), "output": str(folder / "restored.mkv")}
    worker.start("restore/vrt", **places)
    worker.wait_for("tiles")
    time.sleep(8)
    everything = worker.process.children(recursive=True)
    (prefects,) = (child for child in worker.process.children() if "worker" in child.cmdline())
    prefects.kill()
    nothing_left([worker.process, *everything])
    assert not (folder / "restored.mkv").exists()
    assert any((folder / ".restoring-restored.mkv" / "restored").iterdir())
    with another(worker):
        assert worker.settled(worker.start("restore/vrt", **places)).state_name == "Completed"
    assert (folder / "restored.mkv").stat().st_size


def test_a_machine_that_vanished_is_found_out_and_the_next_run_is_accepted_within_two_minutes(worker, uninterrupted):
    run = begun(worker)
    everything = [worker.process, *worker.process.children(recursive=True)]
    for signalled in (signal.SIGSTOP, signal.SIGKILL):
        # Stopped first: none of them may see another die.
        for each in everything:
            each.send_signal(signalled)
    vanished = time.monotonic()
    with another(worker):
        following = worker.start("train/vrt", retry_pause=0)
        worker.wait_for("Running stage 'train'")
        assert time.monotonic() - vanished < 150, "two minutes, and what a worker takes to start"
        assert worker.settled(run).state_name == "Crashed"
        assert worker.settled(following).state_name == "Completed"
    assert_same_training(uninterrupted, worker.workspace)


def test_while_prefect_is_gone_a_training_goes_on_and_afterwards_it_can_be_cancelled(worker, local_services):
    run = begun(worker, overrides=ENDLESS)
    mark = servers.mark("prefect", local_services.home / "services")
    process.stop([mark])
    worker.wait_for("Prefect does not take")
    time.sleep(130)
    worker.workspace.log.write_text("")
    worker.wait_for("registered")
    trainers = worker.trainers()
    local.up(local_services.home)
    worker.wait_for("Prefect takes the state of the run again")
    assert worker.look(run).state_name == "Running"

    worker.prefect("flow-run", "cancel", run)

    nothing_left(trainers)
    assert "received SIGTERM" in worker.workspace.log.read_text()
    assert worker.settled(run).state_name in ("Cancelled", "Crashed")


def test_while_the_store_is_gone_a_run_waits_wherever_it_is(worker, uninterrupted, local_services):
    store = servers.mark("s3", local_services.home / "services")

    def gone_until(text: str) -> None:
        worker.wait_for(text)
        local.up(local_services.home)

    run = begun(worker)
    process.stop([store])
    (trainer,) = worker.trainers()
    trainer.kill()
    # DVC does not even start a trainer. More often than a training is started again that crashes.
    gone_until("attempt 5: a service does not answer")
    assert worker.settled(run).state_name == "Completed"
    ends = [line.split(" | ")[1] for line in worker.artifacts(run)["result"].split("## Checkpoints")[0].splitlines() if re.match(r"\| \d+ \| ", line)]
    assert ends[0] == "crashed: killed by SIGKILL" and ends[-1] == "done"
    assert set(ends[1:-1]) == {"a service did not answer"} and len(ends) > 5
    assert_same_training(uninterrupted, worker.workspace)

    process.stop([store])
    run = worker.start("train/vrt", retry_pause=0)
    gone_until("looking again in 30 s")
    worker.wait_for("$ vrt checkpoints verify 24")
    process.stop([store])
    gone_until("failed, for want of a service it seems; trying again in 30 s")
    assert worker.settled(run).state_name == "Completed"


def test_a_run_waits_for_the_lock_that_another_command_of_dvc_holds(worker):
    lock = Path(worker.workspace.root / ".dvc/tmp/lock")
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run = worker.start("train/vrt", retry_pause=0)
        worker.wait_for("$ dvc --wait-for-lock pull")
        # DVC's own patience is three seconds.
        time.sleep(10)
        assert worker.look(run).state_name == "Running"
    assert worker.settled(run).state_name == "Completed"


def test_a_machine_that_finds_nothing_left_to_train_fetches_what_it_reads_back(worker):
    assert worker.settled(worker.start("train/vrt", retry_pause=0)).state_name == "Completed"
    (folder,) = (path for path in (worker.workspace.root / "checkpoints").iterdir() if path.is_dir())
    # As where only the beginning was trained, and the rest elsewhere.
    for path in folder.glob("24_*"):
        path.unlink()
    run = worker.start("train/vrt", retry_pause=0)
    assert worker.settled(run).state_name == "Completed", worker.workspace.log.read_text()
    assert "Nothing was left to train" in worker.artifacts(run)["result"]
    assert (folder / "24_manifest.json").exists()


def test_a_flow_called_in_python_needs_no_server(make_workspace, uninterrupted):
    workspace = make_workspace("direct")
    script = "from pipelines.train import train; train(retry_pause=0)"
    environment = {key: value for key, value in workspace.environment.items() if key != "PREFECT_API_URL"}
    (workspace.root / "prefect.toml").unlink()
    environment["PREFECT_HOME"] = str(workspace.root / "prefect-home")
    # The server that Prefect starts for the moment makes a database first: on a busy machine it takes longer than the 20 s that it has.
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    ended = subprocess.run([sys.executable, "-c", script], cwd=workspace.root, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert_same_training(uninterrupted, workspace)


def test_what_doctor_finds_wrong_ends_a_run_before_anything_is_fetched_or_packed(worker):
    run = worker.start("train/vrt", overrides={"name": "nowhere", "data.dataset": "nowhere"})
    found = worker.settled(run)
    assert found.state_name == "Failed"
    assert "`vrt doctor` finds that this training can't begin here" in found.state.message and "no data set data/raw/nowhere" in found.state.message
    assert "$ dvc" not in worker.workspace.log.read_text()

    run = worker.start("train/vrt", overrides={"name": "unshared", "train.batch_size": 2}, processes=3)
    assert "train.batch_size 2: expected a multiple of the 3 processes that share it" in worker.settled(run).state.message
    assert "$ dvc" not in worker.workspace.log.read_text()

    # What only packed clips tell, the trainer refuses.
    run = worker.start("train/vrt", overrides={"name": "too-large", "train.crop": 4096})
    found = worker.settled(run)
    assert found.state_name == "Failed" and "can't be started as it is" in found.state.message and "train.crop" in found.state.message
    assert "training" not in worker.artifacts(run)


def test_a_rank_that_dies_costs_a_run_of_several_processes_one_attempt(worker):
    worker.workspace.edit(train__batch_size=2)
    # On a machine with a single GPU they train on its CPU.
    environment = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() == 1 else {}
    run = begun(worker, processes=2, environment=environment)
    ranks = [child for child in worker.process.children(recursive=True) if child.environ().get("LOCAL_RANK")]
    assert len(ranks) == 2
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()

    assert worker.settled(run).state_name == "Completed"

    log = worker.workspace.log.read_text()
    assert "training with 2 processes" in log and "rank 0 of 2 on" in log, log
    nothing_left(ranks)
    attempts = [line for line in worker.artifacts(run)["result"].splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert "crashed: PeerLost: rank 0 of 2" in attempts[0] and "| done |" in attempts[1], attempts
    went_on_after = int(attempts[1].split("|")[3])
    assert went_on_after >= 4, attempts

    cancelled = begun(worker, processes=2, environment=environment, overrides=ENDLESS | {"name": "cancelled-together"})
    everything = [process for engine in worker.process.children() for process in engine.children(recursive=True)]
    assert len(everything) >= 5
    worker.prefect("flow-run", "cancel", cancelled)
    assert worker.settled(cancelled).state_name == "Cancelled"
    nothing_left(everything)
