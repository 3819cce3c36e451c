"""Checkpoints to work with, made by the real code, and child processes to break."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest

PROJECT = Path(__file__).resolve().parents[2]
LINEAGE = "tiny-0123456789"

Commit = Callable[..., Manifest]


@pytest.fixture
def lineage() -> str:
    return LINEAGE


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    made = CheckpointFolder(tmp_path / "checkpoints")
    made.prepare()
    return made


@pytest.fixture
def commit() -> Commit:
    """Commits a small checkpoint whose content is a function of the step and of `text`."""

    def write(folder: CheckpointFolder, step: int, text: str = "", lineage: str = LINEAGE, metrics: Mapping[str, float] = {}) -> Manifest:  # noqa: B006
        contents = {
            "G.pth": lambda file: file.write(f"weights of step {step}{text}".encode() * 1000),
            "history.jsonl": lambda file: file.write(f"history of step {step}{text}".encode()),
        }
        return folder.commit(step, contents, lambda files: Manifest(lineage, step, files, dict(metrics), {"seed": 1}, {"host": "here"}))

    return write


@pytest.fixture
def names() -> Callable[[CheckpointFolder], list[str]]:
    """The names of all files in a checkpoint folder, hidden ones too."""
    return lambda folder: sorted(path.name for path in folder.path.iterdir())


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python script as a process of its own, in the project; whatever lives after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object, before: tuple[str, ...] = (), **options: object) -> subprocess.Popen[str]:
        # SIGHUP as in a terminal, even where the tests themselves run under nohup.
        header = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        command = [*before, sys.executable, "-u", "-c", header + script, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=PROJECT, text=True, **{**pipes, **options})
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            # What a killed launcher leaves behind ends with its input.
            with suppress(OSError):
                pipe.close()


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port on which nobody answers, now or during the test."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
