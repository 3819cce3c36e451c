"""`prefect deployment run train/vrt` against a real Prefect server, as a user has it: what it does by itself, and what nothing can take from it."""

import re

import psutil
import pytest
from mlflow import MlflowClient

from tests.browser import needs_browser, shows
from tests.same_training import assert_same_training
from vrt.status import read_status

ENDLESS = {"train.total_steps": 100_000}


@pytest.fixture(scope="module")
def finished(worker):
    """The id of a run that was killed once, preempted once, and completed."""
    run = worker.start("train/vrt", {"VRT_KILL_AT": "step:14"}, retry_pause=0)
    worker.wait_for("continuing after step")
    worker.wait_for("checkpoint 16 registered")
    (trainer,) = worker.trainers()
    trainer.terminate()
    found = worker.settled(run)
    assert found.state_name == "Completed", worker.workspace.log.read_text()
    return run


def test_crashed_and_preempted_a_run_completes_as_if_nothing_had_happened(worker, finished, uninterrupted):
    run = finished
    workspace, log = worker.workspace, worker.workspace.log.read_text()
    assert_same_training(uninterrupted, workspace)
    shown = worker.artifacts(run)
    attempts = [line.split(" | ") for line in shown["result"].splitlines() if re.match(r"\| \d \| ", line)]
    assert [attempt[1] for attempt in attempts] == ["crashed: killed by SIGKILL", "preempted", "done"]
    assert [attempt[5] for attempt in attempts] == ["1", "0", "0"], "13 was seen done, 12 is registered"
    assert shown["training"] == 100.0
    assert "/runs/" in shown["mlflow-run"] and "/runs/" in shown["result"]
    assert re.search(r"\| 24 \| \d+\.\d\d dB \| \d+\.\d MB \| yes \|", shown["result"]), shown["result"]
    assert "checkpoint 24 registered" in worker.prefect("flow-run", "logs", run), "the stages' output belongs in the flow's log"
    assert "was killed; its run in MLflow says so now" in log
    assert re.search(r"\d+ files? pushed", log), log
    of_dvc = [f"dvc --wait-for-lock {words}" for words in ("pull", "repro --pull prepare", "repro --pull train")]
    began = [log.index(f"$ {command}") for command in ("vrt doctor", *of_dvc)]
    assert began == sorted(began), "packing a large data set takes hours: what is missing is told before"

    again = workspace.run("dvc", "repro")

    assert again.returncode == 0
    assert "Data and pipelines are up to date" in again.stdout


@needs_browser
def test_the_pages_show_what_people_look_for(worker, finished):
    run = finished
    environment, name = worker.workspace.environment, worker.workspace.name
    prefect, mlflow = environment["PREFECT_API_URL"].removesuffix("/api"), environment["MLFLOW_TRACKING_URI"]
    shows(f"{prefect}/runs/flow-run/{run}", "Completed", f"training:{name}", "7 Task runs", "Logs", "Artifacts")
    shows(f"{prefect}/artifacts", "mlflow-run", "The run in MLflow", "training", "step 24 of 24, newest registered 24", "What came of the training")
    form = worker.look(run).deployment_id
    shows(f"{prefect}/deployments/deployment/{form}/run", "One of recipes/, instead of the project's params.yaml", "Only say what would be done")
    client = MlflowClient(mlflow)
    newest = client.get_model_version_by_alias(f"vrt-{name}", "latest-step")
    lineage = newest.tags["lineage"]
    experiment = client.get_run(newest.run_id).info.experiment_id
    of_run = f"{mlflow}/#/experiments/{experiment}/runs/{newest.run_id}"
    shows(of_run, lineage, "Finished", "remove noise", f'vrt train --resume "fork {lineage}@24"', "val/psnr", "test/psnr", f"vrt-{name}")
    shows(f"{of_run}/system-metrics", "system/cpu_utilization_percentage")
    tags = ("code_version", "data_version", "dvc_data", "recipe", "attempt", "val_psnr", "val_ssim", "train_loss", "digest", "bytes")
    shows(f"{mlflow}/#/models/vrt-{name}/versions/{newest.version}", "Step 24 of", "its files", "@ latest-step", lineage, *tags)
    shows(f"{mlflow}/#/models/vrt-{name}", "@ latest-step", "@ best", "val_psnr")


@pytest.mark.long
def test_what_goes_wrong_again_and_again_fails_and_what_is_refused_is_not_tried_again(worker):
    crashing = worker.start("train/vrt", {"VRT_KILL_AT": "write:1"}, overrides={"name": "crashing"}, retry_pause=0)
    found = worker.settled(crashing)
    assert found.state_name == "Failed"
    assert "crashed 3 times at step 1 with no step registered in between; step 0 is the newest registered" in found.state.message
    assert "The last error: killed by SIGKILL" in found.state.message
    assert worker.artifacts(crashing)["attempts"].count("killed by SIGKILL") == 3

    refused = worker.start("train/vrt", overrides={"name": "refused"}, resume="must")
    found = worker.settled(refused)
    assert found.state_name == "Failed" and "can't be started as it is" in found.state.message
    assert "attempt 1" not in worker.workspace.log.read_text(), "it is not tried again"


@pytest.mark.long
def test_what_a_run_trains_by_is_left_alone_by_others_that_would_train_it_otherwise(worker):
    running = worker.start("train/vrt", overrides=ENDLESS | {"name": "busy"})
    worker.wait_for("checkpoint 4 registered")
    (params,) = (worker.workspace.root / ".vrt" / "workspaces").glob("busy-*/params.yaml")
    before = params.read_bytes()
    rehearsed = worker.settled(worker.start("train/vrt", overrides={"name": "busy", "train.total_steps": 200_000}, dry_run=True))
    assert rehearsed.state_name == "Cancelled" and "trains busy-" in rehearsed.state.message
    assert params.read_bytes() == before
    worker.prefect("flow-run", "cancel", running)
    assert worker.settled(running).state_name == "Cancelled"


@pytest.mark.long
def test_what_is_not_wanted_any_more_saves_and_ends(worker):
    cancelled = worker.start("train/vrt", overrides=ENDLESS | {"name": "cancelled"})
    worker.wait_for("checkpoint 4 registered")
    trainers = worker.trainers()
    assert trainers
    worker.prefect("flow-run", "cancel", cancelled)
    assert worker.settled(cancelled).state_name == "Cancelled"
    assert_saved_and_gone(worker, "cancelled", trainers)

    stopped = worker.start("train/vrt", overrides=ENDLESS | {"name": "stopped"})
    worker.wait_for("checkpoint 4 registered")
    everything = worker.process.children(recursive=True)
    worker.process.terminate()
    assert_saved_and_gone(worker, "stopped", everything)
    assert worker.process.wait(60) == 0
    # At the latest by the heartbeat automation, should it have had no time to say so itself.
    assert worker.settled(stopped).state_name == "Crashed"


def assert_saved_and_gone(worker, name: str, processes) -> None:
    """All processes have ended, and the last step that was trained is registered; asked of the trainer's own status: logs end with their worker."""
    _, alive = psutil.wait_procs(processes, timeout=90)
    assert not alive
    (path,) = (worker.workspace.root / ".vrt" / "workspaces").glob(f"{name}-*/checkpoints/status.json")
    status = read_status(path, since=0.0)
    assert status.step >= 4 and status.registered == status.step and status.error == ""
