"""Whether a training that ended is started again, and when: decided from how its attempts ended, without touching anything."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, pairwise, takewhile

from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_CONTINUE_ME, EXIT_DONE, EXIT_UNAVAILABLE
from vrt.status import TrainingStatus

MOST_CRASHES = 3
"""In a row, without a step registered in between."""
LONGEST_PAUSE = 300.0
GROWTH = 3.0


class End(StrEnum):
    """How an attempt ended."""

    DONE = "done"
    PREEMPTED = "preempted"
    REFUSED = "refused"
    UNAVAILABLE = "a service did not answer"
    CRASHED = "crashed"


def end_of(code: int) -> End:
    """What the exit code of `vrt train` says."""
    known = {EXIT_DONE: End.DONE, EXIT_CONTINUE_ME: End.PREEMPTED, EXIT_BAD_INPUT: End.REFUSED, EXIT_UNAVAILABLE: End.UNAVAILABLE}
    return known.get(code, End.CRASHED)


@dataclass(frozen=True)
class Attempt:
    """One process of a training, from its start to its end; times in seconds since the epoch."""

    end: End
    code: int
    started: float
    status: TrainingStatus | None
    """What it last said of itself; None: it ended before it could say anything."""
    words: str
    """The last lines of its output."""

    @property
    def registered(self) -> int:
        """The newest registered step that it knew of; 0: none, or it said nothing."""
        return self.status.registered if self.status else 0

    @property
    def step(self) -> int:
        """The newest step that it logged; 0: none, or it said nothing."""
        return self.status.step if self.status else 0

    @property
    def recovery(self) -> float | None:
        """Seconds from its start until it trained; None: it never did."""
        trained = self.status.training_since if self.status else None
        return trained - self.started if trained else None

    @property
    def reason(self) -> str:
        """Why it ended, in a line."""
        if self.end is End.CRASHED and self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        if self.status and self.status.error:
            return self.status.error.splitlines()[0]
        return f"exit code {self.code}"


@dataclass(frozen=True)
class Verdict:
    """What to do after an attempt: start again after `pause` seconds, or (None) not."""

    pause: float | None
    why: str


def decide(attempts: Sequence[Attempt], first_pause: float) -> Verdict:
    """What to do after the last of the attempts, none of which is done.

    A training that registers steps between its crashes is never given up; one that crashes MOST_CRASHES times without is.
    """
    last = attempts[-1]
    assert last.end is not End.DONE
    if last.end is End.REFUSED:
        return Verdict(None, f"the training can't be started as it is:\n{last.words}")
    alike = _alike(attempts)
    pause = min(LONGEST_PAUSE, first_pause * GROWTH ** (alike - 1))
    if last.end is End.UNAVAILABLE:
        return Verdict(pause, f"a service does not answer ({last.reason})")
    if last.end is End.PREEMPTED:
        return Verdict(0.0 if alike == 1 else pause, f"preempted at step {last.step}, which is saved")
    if alike >= MOST_CRASHES:
        steps = ", ".join(str(attempt.step) for attempt in attempts[-alike:])
        where = f"at step {last.step}" if len({attempt.step for attempt in attempts[-alike:]}) == 1 else f"at steps {steps}"
        return Verdict(
            None,
            f"crashed {alike} times {where} with no step registered in between; step {last.registered} is the newest registered. "
            f"The last error: {last.reason}\n{last.words}",
        )
    return Verdict(pause, f"crashed at step {last.step} ({last.reason}); crash {alike} of {MOST_CRASHES} without a newly registered step")


def _alike(attempts: Sequence[Attempt]) -> int:
    """How many of the last attempts ended in the same way without registering anything new."""
    # One that ended before it could say anything does not know what the others registered.
    newest = accumulate((attempt.registered for attempt in attempts), max)
    ends = list(zip((attempt.end for attempt in attempts), newest))
    return len(list(takewhile(lambda end: end == ends[-1], reversed(ends))))


def table(attempts: Sequence[Attempt]) -> str:
    """The attempts as a table in markdown: how each ended, what it lost and how long it took to get going again."""
    lines = ["| attempt | ended | went on after step | reached | registered | steps lost | recovery |", "|---|---|---|---|---|---|---|"]
    lost = [str(max(0, one.step - (following.status.resumed or 0))) if _trained(following) else "?" for one, following in pairwise(attempts)]
    for number, (attempt, steps_lost) in enumerate(zip(attempts, [*lost, "0" if attempts[-1].end is End.DONE else ""]), start=1):
        how = str(attempt.end) if attempt.end is not End.CRASHED else f"crashed: {attempt.reason}".replace("|", "\\|")
        resumed = "" if not _trained(attempt) else str(attempt.status.resumed)
        recovery = f"{attempt.recovery:.1f} s" if number > 1 and attempt.recovery is not None else ""
        lines.append(f"| {number} | {how} | {resumed} | {attempt.step} | {attempt.registered} | {steps_lost} | {recovery} |")
    return "\n".join(lines)


def _trained(attempt: Attempt) -> bool:
    return attempt.status is not None and attempt.status.resumed is not None
