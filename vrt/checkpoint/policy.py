"""What a training may continue from, as its params say it: `checkpoints.resume`, or `vrt train --resume`."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a resume policy asks for; `step` and `fork` come with a place."""

    AUTO = "auto"
    MUST = "must"
    NEVER = "never"
    STEP = "step"
    FORK = "fork"


@dataclass(frozen=True)
class ResumePolicy:
    """One of

    - auto: the newest healthy checkpoint, else step 1;
    - must: the newest healthy checkpoint, never step 1;
    - never: step 1, and only where the lineage has no checkpoint;
    - a step: go back to it. Newer registered steps stay as they are: a training is a function of its params, so that on machines
      of one kind they come out again with the same bytes, and are registered already. Where a machine computes differently, the
      registry refuses each of them as "registered with other content", unless they were deleted before (`vrt checkpoints prune --after STEP`);
    - fork LINEAGE@STEP: branch off another lineage. The fork is a lineage of its own, even where all params are equal, and goes on at
      STEP + 1 with the parent's weights, averages, optimizer state and history, under its own params. Once it has checkpoints they win:
      starting it again continues it.

    `never` and a step say how to begin. An attempt that began so leaves a note on the run and those after it continue from
    the newest checkpoint: else a training that is killed and started again would lose what it did since.
    """

    kind: Kind
    step: int = 0
    lineage: str = ""

    @classmethod
    def parse(cls, text: str) -> "ResumePolicy":
        """`text` as `vrt.params.Checkpoints.resume` allows it."""
        if text.startswith("fork "):
            lineage, step = text.removeprefix("fork ").rsplit("@", 1)
            return cls(Kind.FORK, int(step), lineage)
        return cls(Kind.STEP, int(text)) if text.isdecimal() else cls(Kind(text))

    def __str__(self) -> str:
        match self.kind:
            case Kind.STEP:
                return str(self.step)
            case Kind.FORK:
                return f"fork {self.parent}"
            case _:
                return self.kind.value

    @property
    def parent(self) -> str:
        """LINEAGE@STEP of a fork; else nothing."""
        return f"{self.lineage}@{self.step}" if self.kind is Kind.FORK else ""

    @property
    def begins(self) -> bool:
        """It says how to begin, and is done once a training began so."""
        return self.kind in (Kind.NEVER, Kind.STEP)


AUTO = ResumePolicy(Kind.AUTO)
