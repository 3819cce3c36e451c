"""Child process groups of a flow: their output in its log, and nothing left running after it."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vrt import services
from vrt.lifecycle import SECONDS_TO_SAVE, launchers, lost_launcher, write_nowhere

PROJECT = Path(__file__).resolve().parents[1]

SECONDS_BETWEEN_LOOKS = 0.5
LINES_KEPT = 10

DVC = ("dvc", "--wait-for-lock")
"""Another run on this machine may be pulling, packing or pushing, for hours. DVC would give up after seconds."""

Logger = logging.Logger | logging.LoggerAdapter


class CommandFailed(RuntimeError):
    """A command of the pipeline ended with another exit code than 0."""


class LauncherGone(RuntimeError):
    """The worker that launched this run died."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    command: str
    code: int
    """Its exit code, negative for a signal; of `dvc repro` that of the stage that failed."""
    tail: tuple[str, ...]
    """The last lines that it logged."""
    answer: str = ""
    """Its standard output, where that was asked for."""
    of_stage: bool = False
    """Whether the code is that of a stage."""

    def check(self) -> "Ended":
        """Itself. Raises CommandFailed, with the last lines, where the command failed."""
        if self.code != 0:
            raise CommandFailed(f"`{self.command}` ended with exit code {self.code}; its last lines:\n" + "\n".join(self.tail))
        return self


def launcher_gone() -> LauncherGone | None:
    """The reason to stop once a process that launched this one died, such as the worker."""
    gone = lost_launcher(launchers())
    if gone is None:
        return None
    write_nowhere(stream.fileno() for stream in (sys.stdout, sys.stderr))
    return LauncherGone(f"process {gone}, which launched this run, is gone; all is saved, and the next run goes on from there")


def run(
    command: Sequence[str],
    logger: Logger,
    folder: Path = PROJECT,
    variables: Mapping[str, str] = {},  # noqa: B006
    interruption: Callable[[], Exception | None] = launcher_gone,
    answers: bool = False,
) -> Ended:
    """Run `python -m COMMAND` in `folder` as a process group of its own, each line of its output in `logger`.

    One that `answers` has its standard output kept apart, as its answer.

    Whatever interrupts this (a cancelled flow, Ctrl-C) stops the whole group first: with SIGTERM, so that a trainer saves.
    So does the exception that `interruption` gives once there is a reason: it is raised. By default that is the launcher's death.
    """
    # One that dies before it was looked at would be missed.
    launchers()
    environment = os.environ | services.load_environment() | {"PYTHONUNBUFFERED": "1", **variables}
    # DVC runs the stages with the first `python` on the path.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    said = " ".join(command)
    logger.info("$ %s", said)
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if answers else subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    # Threads read to the very end: a trainer that is told to stop has more to say, and must not block on a full pipe.
    tail: deque[str] = deque(maxlen=LINES_KEPT)
    answer: list[str] = []
    readers = [threading.Thread(target=_forward, args=(child.stderr or child.stdout, logger, tail), daemon=True)]
    if answers:
        readers.append(threading.Thread(target=answer.extend, args=(child.stdout,), daemon=True))
    for reader in readers:
        reader.start()
    try:
        code = _wait(child, interruption)
    except BaseException as reason:
        try:
            logger.warning("stopping %s (%s): it saves first", said, str(reason) or type(reason).__name__)
        finally:
            stop_group(child)
        raise
    finally:
        for reader in readers:
            reader.join()
    of_stage = code_of_stage(tail) if code else None
    return Ended(said, of_stage or code, tuple(tail), "".join(answer), of_stage is not None)


def _wait(child: subprocess.Popen, interruption: Callable[[], Exception | None]) -> int:
    while True:
        try:
            return child.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            if reason := interruption():
                raise reason from None


def pause(seconds: float, interruption: Callable[[], Exception | None]) -> None:
    """Wait. Raises what `interruption` gives once there is a reason."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if reason := interruption():
            raise reason
        time.sleep(0.2)


def code_of_stage(lines: Iterable[str]) -> int | None:
    """The exit code of the stage that `dvc repro` says it failed for; its own tells nothing."""
    found = [match for line in lines if (match := re.search(r"failed to reproduce .*exited with (-?\d+)", line))]
    return int(found[-1][1]) if found else None


def _forward(lines: Iterable[str], logger: Logger, tail: deque[str]) -> None:
    for line in filter(str.strip, lines):
        tail.append(line.rstrip())
        # rich exits the program (here, this thread) when nobody reads its output any more; but the child's must be read.
        with suppress(SystemExit):
            logger.info("%s", line.rstrip())


def stop_group(child: subprocess.Popen) -> None:
    """End every process of the child's group: SIGTERM, time to save, then SIGKILL."""
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_SAVE
    while _group_lives(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def _group_lives(child: subprocess.Popen) -> bool:
    child.poll()
    return _signal_group(child.pid, 0)


def _signal_group(group: int, number: int) -> bool:
    """False where the group has no process any more."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
