"""Which checkpoints are kept, and how the others go so that none is registered without its bytes, whenever this is killed.

`retain` is the policy, a pure function; `prune` deletes.
"""

from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.resume import Candidate, Registered
from vrt.observe import log
from vrt.params import Checkpoints

# Longer than any upload or download takes.
AGE_OF_LEFTOVERS = timedelta(days=1)


@dataclass(frozen=True)
class Verdict:
    """Whether a registered step stays."""

    step: int
    keep: bool
    reason: str
    """Why it is kept; nothing, where it is not."""


def retain(registered: Iterable[Registered], policy: Checkpoints, damaged: Collection[int] = (), in_use: Collection[int] = ()) -> list[Verdict]:
    """What becomes of each registered checkpoint, newest first.

    What is not registered is not asked about: it may be the only copy there is. Nor does a `damaged` one take the place of a healthy one:
    the newest healthy is always kept, the damaged are kept until they are repaired. What is `in_use` stays, too: a training that went back
    trains below its newest step.
    """
    newest_first = sorted(registered, key=lambda one: -one.step)
    healthy = [one for one in newest_first if one.step not in damaged]
    last = {one.step for one in healthy[: policy.keep_last]}
    scored = [one for one in healthy if one.psnr is not None]
    best = {one.step for one in sorted(scored, key=lambda one: (-(one.psnr or 0.0), one.step))[: policy.keep_best]}

    def reason(one: Registered) -> str:
        if one.step in damaged:
            return "damaged: repair it first"
        if one.step in last:
            return f"one of the last {policy.keep_last}" if policy.keep_last > 1 else "the last"
        if policy.keep_every and one.step % policy.keep_every == 0:
            return f"every {policy.keep_every} steps"
        if one.step in best:
            return "one of the best"
        if one.step in in_use:
            return "in use"
        if one.champion:
            return "the champion"
        return "pinned" if one.pinned else "being downloaded" if one.held else ""

    reasons = {one.step: reason(one) for one in newest_first}
    return [Verdict(step, bool(why), why) for step, why in reasons.items()]


class Unregister(Protocol):
    """The registry, as far as deleting goes."""

    def registered(self) -> dict[int, Registered]:
        """What is registered of the lineage, by step."""

    def unregister(self, step: int) -> None:
        """Take a step out of the registry; its bytes stay where they are."""


class Shelf(Protocol):
    """The store, as far as deleting goes."""

    def delete(self, address: str) -> None:
        """Delete the objects of a step, its manifest first."""

    def sweep(self, older_than: timedelta, registered: Set[int]) -> list[int]:
        """Delete the objects of steps without a manifest that are not `registered`, all of them older than that. Returns the steps."""


def delete(one: Candidate, folder: CheckpointFolder, store: Shelf, registry: Unregister) -> None:
    """Delete one checkpoint everywhere.

    First its version in the registry: from then on nobody is promised its bytes. Then its manifest in the store, then the other objects,
    then the local manifest, then the local files. Cut off anywhere, what is left is not registered: a complete copy counts as published but
    not registered, is registered again by the next attempt and deleted again by its first registration; a copy without a manifest
    is no checkpoint, and `sweep` or the next save of that step clears it.
    """
    if one.registered:
        registry.unregister(one.step)
        reached(Phase.PRUNE)
    if one.address:
        store.delete(one.address)
        reached(Phase.PRUNE)
    folder.delete(one.step)


def prune(
    folder: CheckpointFolder,
    store: Shelf,
    registry: Unregister,
    policy: Checkpoints,
    damaged: Collection[int] = (),
    in_use: Collection[int] = (),
) -> list[int]:
    """Delete what the policy doesn't keep, oldest first, and what is left of deletions that were cut off. Returns the steps.

    Call it where the newest registered checkpoint that is not in `damaged` is known to be healthy: it was just registered, or verified.
    """
    known = registry.registered()
    going = sorted(verdict.step for verdict in retain(known.values(), policy, damaged, in_use) if not verdict.keep)
    for step in going:
        delete(Candidate(step, True, known[step]), folder, store, registry)
    if going:
        log.info("deleted checkpoints %s: checkpoints.keep_* of the params keeps the others", ", ".join(map(str, going)))
    for step in store.sweep(AGE_OF_LEFTOVERS, known.keys()):
        log.info("cleared what was left of checkpoint %d in the store", step)
    return going
