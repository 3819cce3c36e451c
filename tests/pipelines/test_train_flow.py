"""`prefect deployment run train/vrt` against a real Prefect server, as a user has it."""

import re
import subprocess
import sys
import time

import psutil
import pytest


def prefect(workspace, *arguments: str) -> str:
    """Run the prefect command line as a user does in the project folder, with the address from the project's own prefect.toml."""
    environment = {key: value for key, value in workspace.environment.items() if key != "PREFECT_API_URL"}
    command = [sys.executable, "-m", "prefect", *arguments]
    return subprocess.run(command, cwd=workspace.root, env=environment, stdout=subprocess.PIPE, text=True, timeout=240, check=True).stdout


def settled(workspace, run: str) -> str:
    """What Prefect says of a run once it is not being cancelled any more."""
    for _ in range(60):
        said = prefect(workspace, "flow-run", "inspect", run)
        if "StateType.CANCELLING" not in said:
            return said
        time.sleep(0.5)
    return said


def kill_tree(server: subprocess.Popen) -> None:
    for process in psutil.Process(server.pid).children(recursive=True):
        process.kill()
    server.kill()
    server.wait()


@pytest.fixture
def served(make_workspace):
    """A workspace whose deployment is served, and the process that serves it."""
    workspace = make_workspace("flow")
    workspace.edit(train__total_steps=4)
    server = workspace.start("pipelines")
    try:
        workspace.wait_for("is being served", server)
        yield workspace, psutil.Process(server.pid)
    finally:
        kill_tree(server)


def test_the_deployment_trains_to_completed_and_a_second_repro_does_nothing(served):
    workspace, _ = served
    said = prefect(workspace, "deployment", "run", "train/vrt", "--watch")
    assert "Completed" in said, workspace.log.read_text()
    log = workspace.log.read_text()
    assert "checkpoint 4 registered" in log, "the stages' output belongs in the flow's log"
    assert re.search(r"\d+ files? pushed", log), log
    run = re.search(r"UUID: (\S+)", said)[1]
    assert "checkpoint 4 registered" in prefect(workspace, "flow-run", "logs", run)

    again = workspace.run("dvc", "repro")

    assert again.returncode == 0
    assert "Data and pipelines are up to date" in again.stdout


def test_a_cancelled_flow_saves_the_training_and_leaves_no_process(served):
    workspace, server = served
    workspace.edit(train__total_steps=100_000)
    said = prefect(workspace, "deployment", "run", "train/vrt")
    run = re.search(r"UUID: (\S+)", said)[1]
    workspace.wait_for("checkpoint 4 registered", server)
    trainers = [process for process in server.children(recursive=True) if "vrt" in process.cmdline()]
    assert trainers

    prefect(workspace, "flow-run", "cancel", run)

    _, alive = psutil.wait_procs(trainers, timeout=60)
    assert not alive
    said = workspace.log.read_text()
    step = re.search(r"stopping after step (\d+): received SIGTERM", said)[1]
    assert f"checkpoint {step} registered" in said
    assert "StateType.CANCELLED" in settled(workspace, run)
