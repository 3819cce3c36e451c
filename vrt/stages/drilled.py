"""What a drill plans, reads off its trainings, and concludes: the parts of it that decide and touch nothing."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from vrt.checkpoint.manifest import FileEntry
from vrt.checkpoint.phases import KILLED, SECONDS, Phase

LONGEST_SECONDS = 5.0
FILES = 4
"""Files of a checkpoint without a preview; the least there are."""

Files = Mapping[int, tuple[FileEntry, ...]]
"""The files of checkpoints, by step."""


@dataclass(frozen=True)
class Kill:
    """One kill: the `number`-th time a phase is reached, or that many seconds after the first phase was."""

    where: str
    number: float

    @property
    def armed(self) -> str:
        """What `KILL_AT` has to say for it, such as `upload:3`."""
        return f"{self.where}:{self.number:g}"

    def __str__(self) -> str:
        return f"after {self.number:g} s" if self.where == SECONDS else f"{self.where} #{self.number:g}"


def plan(phases: list[Phase], kills: int | None, seed: int, every: int) -> list[Kill]:
    """The kills of a drill: at the phases given, in turn, or each time at another one, or at a random time. The same seed, the same kills."""
    rng = random.Random(seed)
    chosen: list[str] = list(phases) or rng.sample([*Phase, SECONDS], len(Phase) + 1)
    count = kills or len(chosen)
    deepest = {Phase.STEP: 2 * every, Phase.WRITE: 40, Phase.FSYNC: FILES, Phase.RENAME: FILES, Phase.UPLOAD: FILES, Phase.READ_BACK: FILES}
    deepest |= {Phase.PRUNE: 2, Phase.DOWNLOAD: FILES, Phase.REPAIR: FILES}
    planned = []
    for where in (chosen[i % len(chosen)] for i in range(count)):
        number = round(rng.uniform(0, LONGEST_SECONDS), 2) if where == SECONDS else rng.randint(1, deepest.get(Phase(where), 1))
        planned.append(Kill(where, number))
    # What fetches, repairs and deletes needs something to: not at the very beginning.
    return sorted(planned, key=lambda kill: kill.where in (Phase.DOWNLOAD, Phase.REPAIR, Phase.PRUNE)) if not phases else planned


@dataclass(frozen=True)
class Spoken:
    """What the log of a training says."""

    continued: int | None
    """The step it went on from, 0 for a fresh start; None where it was killed before it could say so."""
    killed: bool
    steps: int
    """Steps it did before its kill."""


def read_log(text: str) -> Spoken:
    """What an attempt's log says of how it began and was killed."""
    continued = re.search(r"continuing after step (\d+)", text)
    fresh = "starting at step 1" in text
    killed = re.search(rf"{KILLED} after (\d+) steps", text)
    return Spoken(int(continued[1]) if continued else 0 if fresh else None, killed is not None, int(killed[1]) if killed else 0)


@dataclass(frozen=True)
class Attempt:
    """One start of a training, and how it ended."""

    killed: bool
    continued: int | None
    steps: int
    seconds: float
    """From its start until it trained on."""


@dataclass(frozen=True)
class Recovery:
    """One kill and what became of it."""

    kill: Kill
    at: int | None
    """The step it was killed at; None: the training ended without reaching the phase."""
    registered: int
    """The newest registered step when it died."""
    resumed: int = 0
    """The step that was continued from, 0 for a fresh start."""
    seconds: float = 0.0
    """From the start that continued until it trained."""

    @property
    def lost(self) -> int:
        """Steps that had to be trained again."""
        return max(0, (self.at or 0) - self.resumed)

    def __str__(self) -> str:
        if self.at is None:
            return f"{self.kill}: was not reached"
        return (
            f"{self.kill}: killed at step {self.at}, resumed from {self.resumed} ({self.lost} steps lost), training again after {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Verdict:
    """What a drill found; `reasons` is empty where everything is proved."""

    recoveries: list[Recovery]
    last: int
    """The step both trainings ended at."""
    problems: list[str]
    """What was seen to be wrong with the checkpoints themselves."""
    killed: Files
    twin: Files

    def same(self, step: int) -> bool:
        """The two trainings agree on a checkpoint byte by byte; on the start they always do."""
        return not step or (step in self.twin and self.killed.get(step) == self.twin[step])

    @property
    def reasons(self) -> list[str]:
        """All that is not proved, in words."""
        found = list(self.problems)
        for one in self.recoveries:
            if one.at is None:
                found.append(f"{one.kill}: was not reached, so nothing is proved of it")
            elif one.resumed < one.registered:
                found.append(f"{one.kill}: resumed from step {one.resumed}, although step {one.registered} was registered")
        for step in sorted({*self.killed, self.last}):
            if not self.same(step):
                found.append(f"step {step}: {differences(self.killed.get(step, ()), self.twin.get(step, ()))}")
        return found


def differences(one: tuple[FileEntry, ...], other: tuple[FileEntry, ...]) -> str:
    """Which files of a checkpoint the uninterrupted twin has otherwise."""
    if not one or not other:
        return f"only the {'killed training' if one else 'twin'} has this checkpoint"
    theirs = {file.name: file for file in other}
    names = [file.name for file in one if theirs.get(file.name) != file]
    return f"{', '.join(names) or 'a file that is missing'} differs from the twin's"


def show(verdict: Verdict) -> None:
    """Print the table and the verdict in one sentence, or every reason against it."""
    table = Table(title=f"{len(verdict.recoveries)} kills on the way to step {verdict.last}")
    for column in ("killed at", "step", "registered", "resumed from", "lost", "recovery", "identical"):
        table.add_column(column, justify="left" if column == "killed at" else "right")
    for one in verdict.recoveries:
        if one.at is None:
            table.add_row(str(one.kill), "not reached")
            continue
        same = "yes" if verdict.same(one.resumed) else "NO"
        table.add_row(str(one.kill), str(one.at), str(one.registered), str(one.resumed), str(one.lost), f"{one.seconds:.1f} s", same)
    console = Console()
    console.print(table)
    if not verdict.reasons:
        worst = max((one.lost for one in verdict.recoveries), default=0)
        kept = f"each of {len(verdict.killed)} checkpoints is bit-identical to the uninterrupted twin's"
        console.print(f"PROVED: at most {worst} steps were lost, never a registered one, and {kept}", soft_wrap=True)
        return
    console.print("NOT PROVED:")
    for reason in verdict.reasons:
        console.print(f"  {reason}", soft_wrap=True, markup=False)
    if any("differs" in reason for reason in verdict.reasons):
        console.print("On a GPU, steps repeat to the bit only with train.deterministic: true.", soft_wrap=True)
