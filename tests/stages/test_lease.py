"""Two machines, one training: whoever is there keeps it, and who was thought dead comes back to find it taken."""

import os
import signal
import subprocess

import pytest
from mlflow import MlflowClient

# A process table of its own, so that nobody can look whether the other still lives.
ANOTHER_MACHINE = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_unshare() -> bool:
    try:
        return subprocess.run([*ANOTHER_MACHINE, "true"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def make_quick_workspace(make_workspace):
    """Workspaces that train one lineage for ever, and whose trainers are believed dead after seconds, not a minute."""
    name = f"lease-{os.getpid()}"

    def make(folder: str):
        workspace = make_workspace(folder)
        workspace.edit(name=name, train__total_steps=100_000)
        lease = workspace.root / "vrt/checkpoint/lease.py"
        text = lease.read_text()
        for constant, seconds in (("SECONDS_BETWEEN_BEATS = 15.0", 0.5), ("SECONDS_UNTIL_DEAD = 60.0", 5.0)):
            assert constant in text
            text = text.replace(constant, f"{constant.split(' = ')[0]} = {seconds}")
        lease.write_text(text)
        return workspace

    return make


@pytest.mark.skipif(not can_unshare(), reason="needs the right to start a process in a process table of its own")
@pytest.mark.long
def test_a_trainer_that_was_thought_dead_stops_and_leaves_the_training_to_its_successor(make_quick_workspace):
    here, beside, far = (make_quick_workspace(folder) for folder in ("here", "beside", "far"))
    first = here.start("vrt", "train")
    here.wait_for("checkpoint 1 registered", first)

    refused = beside.vrt("train")
    assert refused.returncode == 1, refused.stdout
    assert f"process {first.pid} on " in refused.stdout and "one trainer at a time" in refused.stdout
    assert "Traceback" not in refused.stdout

    first.send_signal(signal.SIGSTOP)
    with far.log.open("w") as output:
        command = [*ANOTHER_MACHINE, "python", "-m", "vrt", "train"]
        second = subprocess.Popen(command, cwd=far.root, env=far.environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        far.wait_for("is gone without letting go", second)
        # The first may have been stopped between publishing a step and registering it.
        far.wait_for("continuing after step", second)
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 1
    finally:
        first.kill()
        second.kill()
        second.wait()
    told = here.log.read_text()
    assert "has taken over at" in told and "this one stops and publishes nothing more" in told
    assert "Traceback" not in told
    # The run is its successor's: it is not marked as failed by the one that was overtaken.
    client = MlflowClient(here.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("vrt")
    lineage = next(path.name for path in (here.root / "checkpoints").iterdir() if path.is_dir())
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`vrt.lineage` = '{lineage}'")
    assert run.info.status == "RUNNING"
