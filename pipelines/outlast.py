"""`python -m pipelines.outlast COMMAND...`: run a command as the main process of a container, and end once all that it started has.

A container ends with its main process, whatever else still works in it. Prefect kills a flow 30 s after SIGTERM and ends at once: the
trainer that still saves would be lost with the container, where on a machine it would finish.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil

from vrt.lifecycle import SECONDS_TO_SAVE

PR_SET_CHILD_SUBREAPER = 36


def outlast(command: Sequence[str]) -> int:
    """Run `command`, pass SIGTERM and SIGINT on to it, and give what it leaves behind the time that a save may take.

    Returns its exit code; 128 and the signal's number where one ended it, as a shell does. Raises OSError where it can't be started.
    """
    _adopt_orphans()
    started: list[int] = []
    early: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if not started:
            early.append(number)
        for pid in started:
            # It may have ended in this moment.
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    child = subprocess.Popen(command)
    started.append(child.pid)
    for number in early:
        child.send_signal(number)
    # Whatever ends is taken note of, not the command alone: a trainer that has saved would look alive to the flow that waits for its end.
    ended = 0
    while ended != child.pid:
        ended, status = os.wait()
    child.returncode = code = os.waitstatus_to_exitcode(status)
    deadline = time.monotonic() + SECONDS_TO_SAVE
    # Again, since the end of one leaves its own children here.
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.5)
    return code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, which is process 1 otherwise."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(outlast(sys.argv[1:]))
