"""What a flow run survives, and what the next one takes over from it: killed workers, killed runs, vanished machines, servers that go away."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

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


def test_a_flow_called_in_python_needs_no_server(make_workspace, uninterrupted):
    workspace = make_workspace("direct")
    script = "from pipelines.train import train; train(retry_pause=0)"
    environment = {key: value for key, value in workspace.environment.items() if key != "PREFECT_API_URL"}
    (workspace.root / "prefect.toml").unlink()
    environment["PREFECT_HOME"] = str(workspace.root / "prefect-home")
    ended = subprocess.run([sys.executable, "-c", script], cwd=workspace.root, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert_same_training(uninterrupted, workspace)


def test_what_doctor_finds_wrong_ends_a_run_before_anything_is_fetched_or_packed(worker):
    run = worker.start("train/vrt", overrides={"name": "nowhere", "data.dataset": "nowhere"})
    found = worker.settled(run)
    assert found.state_name == "Failed"
    assert "`vrt doctor` finds that this training can't begin here" in found.state.message and "no data set data/raw/nowhere" in found.state.message
    assert "$ dvc" not in worker.workspace.log.read_text()

    # What only packed clips tell, the trainer refuses.
    run = worker.start("train/vrt", overrides={"name": "too-large", "train.crop": 4096})
    found = worker.settled(run)
    assert found.state_name == "Failed" and "can't be started as it is" in found.state.message and "train.crop" in found.state.message
    assert "training" not in worker.artifacts(run)


def test_a_rank_that_dies_costs_a_run_of_several_processes_one_attempt(worker):
    worker.workspace.edit(train__batch_size=2)
    run = begun(worker, processes=2)
    ranks = [child for child in worker.process.children(recursive=True) if child.environ().get("LOCAL_RANK")]
    assert len(ranks) == 2
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()

    assert worker.settled(run).state_name == "Completed"

    log = worker.workspace.log.read_text()
    assert "training with 2 processes" in log and "rank 0 of 2 on" in log, log
    nothing_left(ranks)
    attempts = [line for line in worker.artifacts(run)["result"].splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert "crashed: PeerLost: rank 0 of 2" in attempts[0] and "| done |" in attempts[1], attempts

    cancelled = begun(worker, processes=2, overrides=ENDLESS | {"name": "cancelled-together"})
    everything = [process for engine in worker.process.children() for process in engine.children(recursive=True)]
    assert len(everything) >= 5
    worker.prefect("flow-run", "cancel", cancelled)
    assert worker.settled(cancelled).state_name == "Cancelled"
    nothing_left(everything)
