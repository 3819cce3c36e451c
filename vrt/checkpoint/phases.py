"""Named points of the checkpoint protocol at which a drill or a test lets the process be killed.

`reached(phase)` does nothing unless VRT_KILL_AT is set, which only `vrt drill` and the tests do:
`upload:3` ends the process by a real SIGKILL the third time an upload is reached, `seconds:2.5` that long after the first phase was.
"""

import os
import signal
import threading
from collections import Counter
from enum import StrEnum

from vrt.observe import log

KILL_AT = "VRT_KILL_AT"
KILLED = "ends this process with SIGKILL"
SECONDS = "seconds"


class Phase(StrEnum):
    """Where the protocol is; each says what is true while a process that is killed there dies."""

    STEP = "step"
    """An optimizer step is done, nothing of it saved."""
    SNAPSHOT = "snapshot"
    """A step that is due is copied to host memory, nothing of it on disk."""
    WRITE = "write"
    """A part of a file is written, under its temporary name."""
    FSYNC = "fsync"
    """A file is written under its temporary name, and not flushed to disk."""
    RENAME = "rename"
    """A file is on disk under its temporary name."""
    MANIFEST = "manifest"
    """All files have their names, the manifest does not exist."""
    COMMITTED = "committed"
    """The checkpoint is on disk; some of its files may be in the store, its manifest is not."""
    UPLOAD = "upload"
    """Some files are in the store, the next one is on its way."""
    READ_BACK = "read-back"
    """A file is uploaded and not verified."""
    REGISTER = "register"
    """All is in the store, nothing in the registry."""
    ALIAS = "alias"
    """The version is registered, the alias still on the one before."""
    PRUNE = "prune"
    """A checkpoint that retention no longer keeps is out of the registry, or out of the store, too."""
    DOWNLOAD = "download"
    """A file from the store is here under a temporary name."""
    REPAIR = "repair"
    """Some files of a damaged checkpoint are moved aside, or some of the sound ones are in their place."""


_counts: Counter[str] = Counter()
_counting = threading.Lock()


def reached(phase: Phase) -> None:
    """Say that the protocol is at `phase`; where this process was armed to be killed there, it dies and this does not return.

    Raises ValueError where VRT_KILL_AT is set to something else than PHASE:COUNT or seconds:NUMBER.
    """
    armed = os.environ.get(KILL_AT)
    if armed:
        _count(phase, armed)


def _count(phase: Phase, armed: str) -> None:
    where, number = _parse(armed)
    with _counting:
        first = not _counts
        _counts[phase] += 1
        if where == SECONDS and first:
            timer = threading.Timer(number, _die, [armed])
            timer.daemon = True
            timer.start()
        if where == phase and _counts[phase] == number:
            _die(armed)


def _die(armed: str) -> None:
    # Counted from the first step of this process on: added to the step it went on from, this is the step it was killed at.
    log.warning("%s=%s %s after %d steps", KILL_AT, armed, KILLED, _counts[Phase.STEP])
    os.kill(os.getpid(), signal.SIGKILL)


def _parse(armed: str) -> tuple[str, float]:
    where, _, number = armed.partition(":")
    try:
        if where == SECONDS:
            return where, float(number)
        return Phase(where), int(number)
    except ValueError:
        names = ", ".join(Phase)
        raise ValueError(f"{KILL_AT}={armed}: expected PHASE:COUNT or {SECONDS}:NUMBER, where PHASE is one of {names}; unset it to train") from None
