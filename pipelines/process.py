"""Child process groups of a flow: their output in its log, and nothing left running after it."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from vrt import services

PROJECT = Path(__file__).resolve().parents[1]

# A trainer that is told to stop finishes its step, saves and publishes within this time.
SECONDS_TO_SAVE = 60.0


class CommandFailed(RuntimeError):
    """A command of the pipeline ended with another exit code than 0."""


def run_in_project(command: Sequence[str], logger: logging.Logger | logging.LoggerAdapter) -> None:
    """Run `python -m COMMAND` in the project as a process group of its own, each line of its output in `logger`.

    Whatever interrupts this (a cancelled flow, Ctrl-C) stops the whole group first: with SIGTERM, so that a trainer saves.
    Raises CommandFailed, with the last lines, where the command fails.
    """
    environment = os.environ | services.load_environment() | {"PYTHONUNBUFFERED": "1"}
    # DVC runs the stages with the first `python` on the path.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    logger.info("$ %s", " ".join(command))
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    # A thread reads to the very end: a trainer that is told to stop has more to say, and must not block on a full pipe.
    tail: deque[str] = deque(maxlen=10)
    reader = threading.Thread(target=_forward, args=(child.stdout, logger, tail), daemon=True)
    reader.start()
    try:
        code = child.wait()
    except BaseException:
        logger.warning("stopping %s: it saves first", " ".join(command))
        stop_group(child)
        raise
    finally:
        reader.join()
    if code != 0:
        raise CommandFailed(f"`{' '.join(command)}` ended with exit code {code}; its last lines:\n" + "\n".join(tail))


def _forward(lines: Iterable[str], logger: logging.Logger | logging.LoggerAdapter, tail: deque[str]) -> None:
    for line in filter(str.strip, lines):
        logger.info("%s", line.rstrip())
        tail.append(line.rstrip())


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
