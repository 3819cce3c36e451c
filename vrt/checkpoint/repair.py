"""What each side has of each checkpoint, and how a damaged or missing copy is restored from the sound one.

`mend` decides, a pure function; `verify` looks, `repair` acts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from vrt.checkpoint.errors import CheckpointError, Missing
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.resume import Candidate, Registered, Side, State, examine_local, fetch, published_manifest
from vrt.checkpoint.store import Store


class Remote(Store, Protocol):
    """The store, as far as verifying and repairing go."""

    def problems(self, address: str, manifest: Manifest, advance: Callable[[int], None]) -> list[str]:
        """What is wrong with the objects at an address, after reading every byte. `advance` is told the bytes of each piece."""

    def delete(self, address: str) -> None:
        """Delete the objects of a step, its manifest first."""


class Books(Protocol):
    """The registry, as far as repairing goes."""

    def check(self, manifest: Manifest) -> Registered | None:
        """What is registered of the same step. Raises CheckpointError where that has other content."""

    def register(self, manifest: Manifest, address: str, folder: Path) -> None:
        """Enter a published checkpoint. Raises CheckpointError as `check` does."""

    def hold(self, step: int) -> AbstractContextManager:
        """While the block runs, nobody deletes the step."""


@dataclass(frozen=True)
class Verified:
    """One step after every byte of both sides was read."""

    step: int
    local: Side
    store: Side
    registered: bool

    def problems(self, local_counts: bool) -> list[str]:
        """All that keeps it from being whole, in words. `local_counts` is False on a machine that has no checkpoint of the lineage at all."""
        found = []
        for name, side, counts in (("local", self.local, local_counts), ("store", self.store, True)):
            if side.state is State.MISSING and counts:
                found.append(f"{name}: missing")
            found += [f"{name}: {problem}" for problem in side.problems]
        return found + ([] if self.registered else ["not registered"])


class Mend(StrEnum):
    """What makes a step whole again, in words for people."""

    NOTHING = "nothing to do"
    FETCH = "restore the local files from the store"
    PUBLISH = "restore the store's objects from the local files"
    REGISTER = "publish and register it"
    LOST = "beyond repair: no side is healthy"


def mend(step: Verified, local_counts: bool = True) -> Mend:
    """What makes a step whole again."""
    local, store = step.local.state is State.HEALTHY, step.store.state is State.HEALTHY
    if not (local or store):
        return Mend.LOST
    if not step.registered:
        # Registering needs the local files; those that are only in the store come here first.
        return Mend.REGISTER
    if not store:
        return Mend.PUBLISH
    return Mend.FETCH if not local and (local_counts or step.local.state is not State.MISSING) else Mend.NOTHING


def verify(
    folder: CheckpointFolder, lineage: str, candidate: Candidate, store: Remote, advance: Callable[[int], None] = lambda size: None
) -> Verified:
    """Read every byte of a step on both sides. `advance` is told the bytes of the store's side as they are read.

    Raises StoreUnavailable where the store does not answer.
    """
    local = examine_local(folder, lineage, candidate)
    return Verified(candidate.step, local, examine_store(lineage, candidate, store, advance), candidate.registered is not None)


def examine_store(lineage: str, candidate: Candidate, store: Remote, advance: Callable[[int], None] = lambda size: None) -> Side:
    """Read every byte that the store has of a step. Raises StoreUnavailable where it does not answer."""
    if candidate.address is None:
        return Side(State.MISSING)
    try:
        manifest = published_manifest(store, lineage, candidate)
        problems = store.problems(candidate.address, manifest, advance)
    except Missing:
        return Side(State.MISSING)
    except CheckpointError as error:
        problems = [str(error)]
    return Side(State.DAMAGED, tuple(problems)) if problems else Side(State.HEALTHY)


def repair(folder: CheckpointFolder, lineage: str, candidate: Candidate, found: Verified, what: Mend, store: Remote, registry: Books) -> None:
    """Carry out `what` `mend` said of a step.

    Raises CheckpointError where it is beyond repair, or where it is registered with other content than the sound copy has.
    """
    if what is Mend.LOST:
        problems = "; ".join(found.problems(local_counts=True))
        raise CheckpointError(f"step {candidate.step} is {what} ({problems}); `vrt checkpoints prune --step {candidate.step}` deletes what is left")
    if what is Mend.FETCH or (what is Mend.REGISTER and found.local.state is not State.HEALTHY):
        with registry.hold(candidate.step) if candidate.registered else nullcontext():
            if any(folder.path.glob(f"{candidate.step}_*")):
                folder.set_aside(candidate.step)
            fetch(folder, lineage, candidate, store)
    if what in (Mend.PUBLISH, Mend.REGISTER):
        manifest = folder.manifest(candidate.step)
        registry.check(manifest)
        address = store.publish(manifest, folder.path)
        if candidate.registered and candidate.registered.address != address:
            raise CheckpointError(
                f"step {candidate.step} is registered at {candidate.registered.address}, below another run than the lineage has now ({address}): "
                "restore that run in MLflow (`mlflow runs restore`), delete the other one, and repair again"
            )
        registry.register(manifest, address, folder.path)
