"""Start, find and stop the processes of a service.

Every process of a service carries a mark in its environment, which its children inherit. So all of them are found again: after `up`
was killed half-way, when a parent died and left its children serving, and without mistaking a stranger who got a dead one's pid.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from vrt.services.state import ServiceError

MARK = "VRT_SERVICE"
_GRACE_SECONDS = 10.0
_KILL_SECONDS = 10.0


def start(command: Sequence[str], environ: Mapping[str, str], mark: str, folder: Path, log_file: Path) -> subprocess.Popen[bytes]:
    """Start a service in a session of its own, so that it outlives the terminal and its Ctrl-C."""
    if log_file.exists():
        # What the last process wrote before it died is often what one looks for.
        log_file.replace(log_file.with_suffix(".previous.log"))
    with open(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        return subprocess.Popen(
            command, cwd=folder, env={**environ, MARK: mark}, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def members(mark: str) -> list[psutil.Process]:
    """The living processes of a service, oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append((process.create_time(), process.pid, process))
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue  # ended, or another user's
    return [process for _, _, process in sorted(found, key=lambda entry: entry[:2])]


def started_with(processes: Iterable[psutil.Process], variable: str) -> str | None:
    """The value of a variable in the environment that `processes` were started with."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.environ().get(variable)
    return None


def listens(processes: Iterable[psutil.Process], port: int) -> bool:
    """Whether one of `processes` serves `port`, rather than a stranger who took it."""
    for process in processes:
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(connection.status == psutil.CONN_LISTEN and connection.laddr.port == port for connection in connections):
            return True
    return False


def stop(marks: Sequence[str]) -> int:
    """End all processes of the services; ask first, then kill. Returns how many there were.

    Raises ServiceError where one survives that.
    """
    living = _all_members(marks)
    count = len(living)
    for process in living:
        _signal(process, signal.SIGTERM)
    _wait(living, _GRACE_SECONDS)
    deadline = time.monotonic() + _KILL_SECONDS
    # Looked for anew each time: a parent may have started a child after the first look.
    while living := _all_members(marks):
        if time.monotonic() > deadline:
            raise ServiceError(
                f"processes {', '.join(str(process.pid) for process in living)}: expected to end after SIGKILL, found alive after "
                f"{_KILL_SECONDS:.0f} s, probably waiting for a disk; look at them with `ps -o pid,stat,wchan,args` and try again"
            )
        for process in living:
            _signal(process, signal.SIGKILL)
        _wait(living, 1.0)
    return count


def _all_members(marks: Iterable[str]) -> list[psutil.Process]:
    return [process for mark in marks for process in members(mark)]


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _wait(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Wait until all have ended; a zombie that its parent does not collect has ended, too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        _, living = psutil.wait_procs(processes, timeout=0.1)
        if not any(map(_lives, living)):
            return


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback now."""
    with socket.socket() as probe:
        # As the servers do: connections of a server that just ended must not make its port look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def is_taken_by_stranger(port: int, mark: str) -> bool:
    """Whether somebody else listens on the port of a service of ours."""
    # In this order: one of ours that begins to listen between the two looks is then seen by the second.
    return not is_free(port) and not listens(members(mark), port)


def free_port(first: int, without: Iterable[int]) -> int:
    """The first free port from `first` on, leaving out those in `without`. Raises ServiceError where 500 are taken."""
    last = min(first + 500, 65535)
    for port in range(first, last + 1):
        if port not in without and is_free(port):
            return port
    raise ServiceError(f"ports {first} to {last} of 127.0.0.1: expected one that is free, found all taken; end programs that listen there")
