"""When a running command has to stop early: it was told to, or whoever started it is gone."""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from vrt.observe import log

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_BETTER = 3
"""`vrt promote` left the champion where it is."""
EXIT_UNAVAILABLE = 69
"""A service that is needed does not answer: try again later (EX_UNAVAILABLE of sysexits.h)."""
EXIT_INTERRUPTED = 130
EXIT_CONTINUE_ME = 75
"""Stopped early with everything saved: start it again and it goes on (75 is EX_TEMPFAIL of sysexits.h)."""

RESUME = "VRT_RESUME"
"""What a launcher that can't change the command line of `vrt train` says instead of --resume."""

PROCESSES = "VRT_PROCESSES"
"""What it says instead of --processes."""
MACHINES = "VRT_MACHINES"
"""Instead of --machines."""
MEET = "VRT_MEET"
"""Instead of --meet."""
OUTCOME = "VRT_OUTCOME"
"""Where a process that torchrun started leaves its exit code for `vrt train`: torchrun itself passes on none."""

SECONDS_TO_SAVE = 60
"""A trainer that is told to stop finishes its step, saves and publishes within this time."""
SECONDS_TO_WIND_UP = 10.0
"""So long what can be done again later goes on after the request; the rest is for saving and publishing."""
SECONDS_BETWEEN_LOOKS = 0.5

Launchers = list[tuple[int, int]]
"""(process, its parent) pairs, from the process itself up to the top of the session that launched it."""


def launchers_of(pid: int) -> Launchers:
    """The chain of processes that launched `pid`: its parent, and on up through the parent's session.

    The chain is what `dvc repro`, a shell and a flow form above a trainer. torchrun gives its workers sessions of their own,
    so it is the parent's session that counts. Under nohup, outliving the launcher is what the user asked for: no chain.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return []
    chain: Launchers = []
    child = psutil.Process(pid)
    try:
        session = os.getsid(child.ppid())
        while (parent := child.parent()) is not None and os.getsid(parent.pid) == session:
            chain.append((child.pid, parent.pid))
            child = parent
    except (psutil.Error, ProcessLookupError, PermissionError):
        # A launcher that ends while we look shows as soon as the chain so far is checked.
        pass
    return chain


@functools.cache
def launchers() -> Launchers:
    """The chain that launched this process, as it was at the first call: make that before anything slow, or one that dies meanwhile is missed."""
    return launchers_of(os.getpid())


def lost_launcher(chain: Launchers) -> int | None:
    """The first process of the chain that died, if one did."""
    for pid, parent in chain:
        try:
            if psutil.Process(pid).ppid() != parent:
                return parent
        except psutil.NoSuchProcess:
            return pid
    return None


def write_nowhere(streams: Iterable[int]) -> None:
    """Let what is written to these file descriptors vanish: whoever read them is gone, and each write would raise."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def torchrun_rank() -> int | None:
    """The number that torchrun gave this process among those of its training; None: torchrun did not start it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def leave(code: int) -> NoReturn:
    """End this process with an exit code, left also where the launcher of a training of several processes looks for it.

    To torchrun a process that stopped as it was asked to has not failed. Python would wait for what does not end: then it is not asked.
    """
    # Threads of gloo and NCCL wait for processes that may be dead.
    at_once = torchrun_rank() is not None or any(thread.is_alive() for thread in _abandoned)
    if OUTCOME in os.environ:
        # Where the launcher is gone, its folder may be, too.
        with suppress(FileNotFoundError):
            Path(f"{os.environ[OUTCOME]}.{os.environ['LOCAL_RANK']}").write_text(str(code))
        if code == EXIT_CONTINUE_ME:
            code = EXIT_DONE
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_abandoned: list[threading.Thread] = []
"""Threads that did not end in time, such as those that wait for a store: the command ends all the same (`leave`)."""


def within(seconds: float, call: Callable[[], object], hurry: Callable[[], bool] = lambda: False, hurried: float = 0.0) -> bool:
    """Call in a thread of its own, and wait so long for its end, only `hurried` seconds more once `hurry` says so. False: it was abandoned.

    Raises what the call raised meanwhile.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    wait_for(thread, seconds, hurry, hurried)
    if thread.is_alive():
        return False
    if raised:
        raise raised[0]
    return True


def wait_for(thread: threading.Thread, seconds: float, hurry: Callable[[], bool], hurried: float) -> None:
    """Wait so long for the end of a thread, only `hurried` seconds more once `hurry` says so; then, or interrupted, abandon it."""
    ends, in_a_hurry = time.monotonic() + seconds, False
    try:
        while thread.is_alive() and time.monotonic() < ends:
            thread.join(0.2)
            if not in_a_hurry and hurry():
                in_a_hurry, ends = True, min(ends, time.monotonic() + hurried)
    finally:
        if thread.is_alive():
            _abandoned.append(thread)


@contextmanager
def held_back(number: signal.Signals) -> Iterator[None]:
    """Let a signal wait while the block runs, and with processes that it starts until they listen: before that, it would end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ToldToStop(Exception):
    """What can be done again later was given up, for the command was told to stop."""


class StopRequest:
    """Says why to stop after the current step, or None. Use it as a context manager in the main thread.

    SIGTERM and SIGUSR1 (preemption notices), SIGHUP (a closed terminal, unless nohup ignores it), the first Ctrl-C, and the death of a
    launcher set it. A second Ctrl-C interrupts the step.
    A signal that came while whoever launched this process held it back (`held_back`) is heard at the start.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._since = 0.0
        self._left = threading.Event()
        self._before: dict[int, object] = {}
        self._held_back: set[int] = set()
        self._terminals: list[int] = []

    def __enter__(self) -> "StopRequest":
        heard = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        # Asked now: one that was closed does not answer.
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        for number in heard:
            self._before[number] = signal.signal(number, self._on_signal)
        self._held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        launchers()
        threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._held_back)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heed(self) -> None:
        """Raises ToldToStop once there is a reason, for SECONDS_TO_WIND_UP already."""
        if self.reason is not None and time.monotonic() - self._since > SECONDS_TO_WIND_UP:
            raise ToldToStop(self.reason)

    def _ask(self, reason: str) -> None:
        if self.reason is None:
            self._since = time.monotonic()
            self.reason = reason

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            write_nowhere(self._terminals)
        self._ask(f"received {signal.Signals(number).name}")

    def _watch(self) -> None:
        said = False
        while not self._left.wait(SECONDS_BETWEEN_LOOKS):
            # Those in sessions of their own, such as torchrun's processes, are not told that their terminal is closed.
            closed = [stream for stream in self._terminals if not os.isatty(stream)]
            write_nowhere(closed)
            self._terminals = [stream for stream in self._terminals if stream not in closed]
            gone = None if self.reason else lost_launcher(launchers())
            if gone is not None:
                self._ask(f"process {gone}, which launched this one, is gone")
            if self.reason and not said:
                log.warning("%s: what is at hand is finished and saved first", self.reason)
                said = True
