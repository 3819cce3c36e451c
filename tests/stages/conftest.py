"""Trainings that start within a second, so that they can be killed by the hundred."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from vrt.checkpoint.phases import KILL_AT

REPOSITORY = Path(__file__).parents[2]
SECONDS_AN_ATTEMPT_MAY_TAKE = 600


@dataclass
class Attempt:
    """A running `vrt train`, forked off the server."""

    pid: int
    log: Path
    _answers: Iterator[str]
    ended: bool = False

    def wait(self) -> int:
        """Until it ends; returns its code, negative for a signal."""
        late = threading.Timer(SECONDS_AN_ATTEMPT_MAY_TAKE, os.kill, [self.pid, signal.SIGKILL])
        late.start()
        try:
            code = int(next(self._answers))
            self.ended = True
            return code
        finally:
            late.cancel()


class ForkServer:
    """Starts attempts one after another, each a forked child with the imports done."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self._last: Attempt | None = None

    def start(self, workspace, kill_at: str = "", variables: Mapping[str, str] = {}) -> Attempt:  # noqa: B006
        """`vrt train` in the workspace; `kill_at` as VRT_KILL_AT takes it."""
        if self._last and not self._last.ended:
            # A test that failed left it behind.
            with suppress(ProcessLookupError):
                os.kill(self._last.pid, signal.SIGKILL)
            self._last.wait()
        environment = {**workspace.environment, **variables, KILL_AT: kill_at}
        workspace.log.write_text("")
        order = {"arguments": ["train"], "folder": str(workspace.root), "environment": environment, "log": str(workspace.log)}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        self._last = Attempt(int(next(self._process.stdout)), workspace.log, self._process.stdout)
        return self._last

    def run(self, workspace, kill_at: str = "") -> tuple[int, str]:
        """Start, wait, and return the code and all that was said."""
        attempt = self.start(workspace, kill_at)
        return attempt.wait(), attempt.log.read_text()


@pytest.fixture(scope="session")
def fork_server(local_services) -> Iterator[ForkServer]:
    environment = {**local_services.environment, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield ForkServer(process)
        process.stdin.close()


@pytest.fixture(scope="session")
def versions_of(local_services) -> Callable[[str], list[ModelVersion]]:
    """What the real registry has of a training by its name, oldest first, asked past our own code."""
    client = MlflowClient(local_services.environment["MLFLOW_TRACKING_URI"])
    return lambda name: sorted(client.search_model_versions(f"name = 'vrt-{name}'", max_results=1000), key=lambda version: int(version.version))
