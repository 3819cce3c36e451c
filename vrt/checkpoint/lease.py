"""One trainer per lineage, on whatever machine: a lease, kept alive by heartbeats, with a token that only grows.

Each trainer enters a claim under the token after the newest; the newest claim is the owner's. Who finds a claim newer than its own was taken
for dead, and publishes nothing more. Clocks are never compared: an observer believes an owner dead once its claim has not changed for
SECONDS_UNTIL_DEAD of the observer's own clock.

What this guarantees depends on where the claims are kept (`Notes`):
- in a store that creates an object only where there is none (probed, not assumed), a token has one owner, for certain;
- elsewhere on the run in the registry, by writing, waiting and reading back. Two that start in the same moment may both believe they own a
  token if one of them stalls for longer than the wait between looking and writing: the first to be overwritten finds out when it is next asked.
In both, asking and then publishing are two steps: a trainer that freezes between them for a minute may still finish that one upload. Where
both compute the same bits it changes nothing. Where they don't, the registry's digest tells that the object is not the one registered; the
successor's local copy restores it (`vrt checkpoints repair`).
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import psutil

from vrt.checkpoint.errors import LeaseLost, LockedError, StoreUnavailable
from vrt.lifecycle import within
from vrt.observe import log

SECONDS_BETWEEN_BEATS = 15.0
# Three beats may be lost, and one be late.
SECONDS_UNTIL_DEAD = 60.0
SECONDS_BETWEEN_LOOKS = 1.0
# A server that is silent would be waited for, and asked again, for minutes.
SECONDS_TO_LET_GO = 10.0

A_DATE = 1e9
"""More seconds than a machine is ever up for: claims of before 2026-11-29 have the time of day at which the process was started."""


class Notes(Protocol):
    """Small texts by name, where every trainer of a lineage can see them."""

    def all(self) -> dict[str, str]:
        """What each note says at this moment, by name."""

    def create(self, name: str, text: str) -> bool:
        """Write a note that does not exist yet. False: it exists."""

    def write(self, name: str, text: str) -> None:
        """Write a note, over what it said before."""

    def remove(self, name: str) -> None:
        """Take a note away."""


@dataclass(frozen=True)
class Claim:
    """One trainer's word that the lineage is its own."""

    token: int
    """Grows with every claim: the newest counts."""
    owner: str
    """Random: tells two claims of one token apart."""
    host: str
    place: str
    """The process table that `pid` is of: two claims of one place can be told dead or alive by looking."""
    pid: int
    born: float
    """When the process was started, in seconds since its machine was: a number that another process of the same pid has not."""
    since: str
    heard: str
    """The time of the newest heartbeat by the owner's clock, for people only."""
    beats: int = 0
    released: bool = False

    @property
    def name(self) -> str:
        """What its note is called."""
        return name_of(self.token)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def name_of(token: int) -> str:
    """What the claim with this token is kept under; names sort as tokens do."""
    return f"{token:08d}"


def newest_claim(notes: Notes) -> Claim | None:
    """The claim with the highest token; None where nobody ever claimed the lineage."""
    claims = []
    for name, text in notes.all().items():
        # A note that someone else left, or that is no claim of this version, must not lock everybody out.
        with suppress(ValueError, TypeError):
            claim = Claim(**json.loads(text))
            if claim.name == name:
                claims.append(claim)
    return max(claims, key=lambda claim: claim.token, default=None)


def next_token(notes: Notes) -> int:
    """One more than any note has, be it a claim that can be read or not: the name of such a note is taken."""
    return 1 + max((int(name) for name in notes.all() if name.isdecimal()), default=0)


def own_claim(token: int) -> Claim:
    """A new claim of this process."""
    process = psutil.Process()
    return Claim(token, uuid.uuid4().hex, platform.node(), _place(), process.pid, _since_boot(process), _now(), _now())


def is_gone(claim: Claim, place: str, born_of: Callable[[int], float | None]) -> bool | None:
    """Whether the owner is known to have ended: True, False, or None where only time can tell.

    `born_of` says when the living process of a pid at `place` was started; None: there is none.
    """
    if claim.released:
        return True
    if claim.place != place:
        return None
    born = born_of(claim.pid)
    if born is not None and (born > A_DATE) != (claim.born > A_DATE):
        return None
    return born != claim.born


def is_abandoned(notes: Notes) -> bool:
    """Whether nobody can be training the lineage: its owner let go, or is known to be gone. Of another machine, only time would tell."""
    claim = newest_claim(notes)
    return claim is None or is_gone(claim, _place(), _born) is True


class Lease:
    """This process's hold on a lineage. `take` it before anything is published, `release` it after the last."""

    def __init__(self, notes: Notes, lineage: str):
        self._notes, self._lineage = notes, lineage
        self._claim: Claim | None = None
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self.lost: LeaseLost | None = None
        """Set once it is known that another trainer has taken the lineage over."""

    @property
    def token(self) -> int:
        """That of the claim which `take` entered; before, there is none."""
        assert self._claim, "not taken"
        return self._claim.token

    def take(self, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Own the lineage from here on, and keep saying so in the background. False: told to give up while waiting.

        Where the owner may be dead, waits until it has been silent for SECONDS_UNTIL_DEAD. Raises LockedError where it is alive.
        """
        while True:
            found = newest_claim(self._notes)
            if found and not self._is_dead(found, give_up):
                if give_up():
                    return False
                raise LockedError(
                    f"{self._lineage}: {found} trains it since {found.since}, last heard of at {found.heard} (by its own clock); one trainer at "
                    "a time: stop that one, which saves and lets go, or wait for its end, or train under another `name` in the params file"
                )
            claim = own_claim(next_token(self._notes))
            self._notes.create(claim.name, json.dumps(asdict(claim)))
            # Read back: where a store does not create exclusively, two may have written; and where an answer was lost and the request sent
            # again, it was refused for this very claim.
            if newest_claim(self._notes) == claim:
                break
            if give_up():
                return False
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._claim = claim
        if found and not found.released:
            log.warning("%s: %s is gone without letting go (last heard of at %s): this trainer goes on", self._lineage, found, found.heard)
        for name in self._notes.all():
            if name < claim.name:
                self._notes.remove(name)
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return True

    def validate(self) -> None:
        """Raises LeaseLost where another trainer has taken over, StoreUnavailable where nobody can tell at the moment."""
        if self.lost:
            raise self.lost
        newest = newest_claim(self._notes)
        assert self._claim, "not taken"
        # A claim that vanished was nobody's to take: the next heartbeat enters it again.
        if newest and (newest.token > self._claim.token or (newest.token == self._claim.token and newest.owner != self._claim.owner)):
            self.lost = LeaseLost(
                f"{self._lineage}: {newest} has taken over at {newest.since} (token {newest.token}, here {self._claim.token}), since nothing was "
                "heard of this trainer for a while; it goes on from the newest registered step, and this one stops and publishes nothing more"
            )
            raise self.lost

    def release(self) -> None:
        """Let go, so that the next trainer need not wait. Never raises: an outage costs the next one on another machine a minute."""
        self._ended.set()
        try:
            reason = "" if within(SECONDS_TO_LET_GO, self._let_go) else f"no answer within {SECONDS_TO_LET_GO:.0f} s"
        except LeaseLost:
            return
        except Exception as error:
            reason = str(error)
        if reason:
            told = "%s: could not let go of the lineage (%s); a trainer on another machine has to wait %.0f s"
            log.warning(told, self._lineage, reason, SECONDS_UNTIL_DEAD)

    def _let_go(self) -> None:
        with self._writing:
            self.validate()
            self._write(replace(self._claim, released=True))

    def _is_dead(self, claim: Claim, give_up: Callable[[], bool]) -> bool:
        gone = is_gone(claim, _place(), _born)
        if gone is not None:
            return gone
        log.warning("%s: watching for %.0f s whether %s still trains it", self._lineage, SECONDS_UNTIL_DEAD, claim)
        ends = time.monotonic() + SECONDS_UNTIL_DEAD
        while time.monotonic() < ends and not give_up():
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = newest_claim(self._notes)
            if now is None or now.released:
                return True
            if now != claim:
                return False
        return not give_up()

    def _beat(self) -> None:
        held_up = ""
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                with self._writing:
                    if self._ended.is_set():
                        return
                    self.validate()
                    self._write(replace(self._claim, beats=self._claim.beats + 1, heard=_now()))
                held_up = ""
            except LeaseLost as error:
                log.error("%s", error)
                return
            except Exception as error:
                # The training goes on and saves locally; before anything is published it is asked again.
                if str(error) != held_up:
                    log.warning("no heartbeat for the lease: %s", error, exc_info=not isinstance(error, StoreUnavailable))
                held_up = str(error)

    def _write(self, claim: Claim) -> None:
        self._notes.write(claim.name, json.dumps(asdict(claim)))
        self._claim = claim


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _place() -> str:
    """This boot of this machine and, in containers, this process table: the same text only where a pid means the same process."""
    parts = [platform.node()]
    for describe in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with suppress(OSError):
            parts.append(describe())
    return " ".join(parts)


def _born(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else _since_boot(process)
    except (psutil.Error, ProcessLookupError):
        return None


def _since_boot(process: psutil.Process) -> float:
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except FileNotFoundError:
        # Elsewhere than on Linux.
        return process.create_time()
    # Not psutil's time of day, which moves for processes that run already when the clock is set.
    return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
