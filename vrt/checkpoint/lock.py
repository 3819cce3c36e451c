"""Who may write a checkpoint folder on this machine: one trainer, by an flock that names it; whoever only fetches, one after the other."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from vrt.checkpoint.errors import CheckpointError, LockedError
from vrt.lifecycle import launchers, lost_launcher
from vrt.observe import log

# An orphaned trainer finishes its step, saves and publishes before it lets go.
SECONDS_FOR_AN_ORPHAN_TO_END = 120.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own `folder` while the block runs; a killed owner lets go by dying.

    An owner whose launcher died is about to save and end: it is waited for. Any other owner means LockedError at once.
    Raises CheckpointError where the folder can't be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror}); make the folder writable or free space there") from error
    with file:
        _acquire(file.fileno(), path)
        file.seek(0)
        file.truncate()
        owner = {"pid": os.getpid(), "launchers": launchers(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        json.dump(owner, file)
        file.flush()
        yield


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Work in `folder`, in which nobody trains, while no other process does: wait for those that came before."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _acquire(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + SECONDS_FOR_AN_ORPHAN_TO_END
    said = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(path)
        # Between its flock and its first write an owner is nameless: look again.
        if owner and lost_launcher(owner["launchers"]) is None or time.monotonic() > deadline:
            raise LockedError(
                f"{path.parent}: process {owner.get('pid', 'unknown')} has been training here since {owner.get('since', 'just now')}; "
                "one trainer at a time: wait for it, stop it, or train in another folder"
            )
        if owner and not said:
            log.warning("%s: process %s lost its launcher and is saving; waiting for it to end", path.parent, owner["pid"])
            said = True
        time.sleep(0.2)


def _owner(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        return {}
