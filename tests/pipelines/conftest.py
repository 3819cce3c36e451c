"""A worker for the deployments of a workspace, as `make serve` starts it."""

import fcntl
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

SECONDS_A_RUN_MAY_TAKE = 600


@dataclass
class Worker:
    """`python -m pipelines` at work in a workspace; the workspace's log has its output."""

    workspace: Any
    process: psutil.Process

    def prefect(self, *arguments: str) -> str:
        """Run the prefect command line as a user does in the project folder, with the address from the project's own prefect.toml."""
        environment = {key: value for key, value in self.workspace.environment.items() if key != "PREFECT_API_URL"}
        command = [sys.executable, "-m", "prefect", *arguments]
        ended = subprocess.run(command, check=True, cwd=self.workspace.root, env=environment, stdout=subprocess.PIPE, text=True)
        return ended.stdout

    def start(self, deployment: str, environment: Mapping[str, str] = {}, **parameters: Any) -> str:  # noqa: B006
        """Start a run of a deployment, its processes with these variables; returns its id."""
        self.workspace.log.write_text("")
        variables = ["--job-variable", f"env={json.dumps(environment)}"] if environment else []
        given = [part for key, value in parameters.items() for part in ("--param", f"{key}={json.dumps(value)}")]
        return re.search(r"UUID: (\S+)", self.prefect("deployment", "run", deployment, *variables, *given))[1]

    def look(self, run: str) -> FlowRun:
        with temporary_settings({PREFECT_API_URL: self.workspace.environment["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
            return client.read_flow_run(run)

    def settled(self, run: str) -> FlowRun:
        """The run, once it is in a state that it stays in."""
        for _ in range(SECONDS_A_RUN_MAY_TAKE):
            found = self.look(run)
            if found.state.is_final():
                return found
            time.sleep(1)
        raise AssertionError(f"still {found.state_name}:\n{self.workspace.log.read_text()}")

    def artifacts(self, run: str) -> dict[str, str]:
        """What the run shows in Prefect, by key."""
        with temporary_settings({PREFECT_API_URL: self.workspace.environment["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
            of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            found = sorted(client.read_artifacts(artifact_filter=of_run), key=lambda artifact: artifact.created)
        return {artifact.key: artifact.data for artifact in found}

    def wait_for(self, text: str) -> None:
        self.workspace.wait_for(text, self.process)

    def trainers(self) -> list[psutil.Process]:
        """The processes below it that train."""
        return [child for child in self.process.children(recursive=True) if child.cmdline()[-3:] == ["-m", "vrt", "train"]]


@contextmanager
def at_work(workspace) -> Iterator[Worker]:
    """A worker in the workspace. One at a time: all of them would take runs from the session's one server."""
    with (Path(workspace.environment["VRT_HOME"]) / "at-work").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with working_on(workspace) as worker:
            yield worker


@contextmanager
def working_on(workspace) -> Iterator[Worker]:
    """A worker where this test has the turn already: in the place of one that died."""
    # As in a terminal, even where the tests themselves run under nohup: there, outliving who launched it is what one asks for.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = workspace.start("pipelines", start_new_session=True)
    signal.signal(signal.SIGHUP, before)
    try:
        workspace.wait_for("started!", process)
        yield Worker(workspace, psutil.Process(process.pid))
    finally:
        kill_tree(process)


@pytest.fixture(scope="module")
def worker(make_workspace) -> Iterator[Worker]:
    """The worker of a test module."""
    with at_work(make_workspace("flow")) as worker:
        yield worker


def kill_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait()
