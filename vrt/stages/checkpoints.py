"""What `vrt checkpoints` does with the checkpoints of one lineage, wherever they are."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.repair import Mend, Verified, mend, repair, verify
from vrt.checkpoint.resume import Candidate, State, candidates, examine_local, fetch
from vrt.checkpoint.retention import Verdict, delete, prune, retain
from vrt.checkpoint.store import MB, S3Store
from vrt.data.clips import PreparedData
from vrt.observe import log, progress
from vrt.params import Checkpoints, load_params
from vrt.stages import CHECKPOINTS, PREPARED
from vrt.stages.adopt import adopt
from vrt.stages.lineage import lineage_of, origin_here
from vrt.stages.start import unknown_lineage
from vrt.training.session import build_state


@dataclass(frozen=True)
class Desk:
    """One lineage as a person looks after it: its local folder, its store, its registry, and every step that any of them knows."""

    folder: CheckpointFolder
    store: S3Store | None
    """None: it has no run in MLflow yet, and so no place in the store."""
    registry: Curator
    known: list[Candidate]

    @property
    def lineage(self) -> str:
        """Its id, as the folder and the run are called."""
        return self.registry.lineage.id

    @property
    def local_counts(self) -> bool:
        """On a machine that never trained the lineage nothing is missing."""
        return any(candidate.local for candidate in self.known)

    def chosen(self, steps: Sequence[int]) -> list[Candidate]:
        """The candidates of these steps, or all. Raises CheckpointError for a step that nobody knows."""
        known = {candidate.step: candidate for candidate in self.known}
        for step in steps:
            if step not in known:
                raise CheckpointError(f"{self.lineage}: there is no step {step}; found: {', '.join(map(str, known)) or 'none'}")
        return [known[step] for step in steps] or self.known

    def manifest(self, candidate: Candidate) -> Manifest:
        """From the local folder, else from the store. Raises CheckpointError where neither has a readable one."""
        if candidate.local or not (self.store and candidate.address):
            return self.folder.manifest(candidate.step)
        return self.store.manifest(candidate.address)


def open_desk(lineage: str | None, params_path: Path) -> Desk:
    """The desk of a lineage named NAME-FINGERPRINT, else of the params file and the prepared data at hand.

    Raises CheckpointError where it has no checkpoint anywhere.
    """
    registry = Curator(lineage_named(lineage) if lineage else lineage_of(load_params(params_path), PreparedData.open(PREPARED)))
    folder = CheckpointFolder(CHECKPOINTS / registry.lineage.id)
    registered = registry.registered()
    prefix = registry.checkpoints_address if registry.attach() else ""
    if registered and not prefix:
        # Its run was deleted; its checkpoints are where they were.
        prefix = next(iter(registered.values())).address.rsplit("/", 1)[0]
    store = S3Store(prefix) if prefix else None
    known = candidates(folder.steps(), registered, sys.maxsize, store.published() if store else {})
    if not known:
        raise CheckpointError(unknown_lineage(registry.lineage.id, registry))
    return Desk(folder, store, registry, known)


def verify_all(desk: Desk, chosen: Sequence[Candidate]) -> list[Verified]:
    """Read every byte of the steps on both sides, with progress."""
    sizes = {}
    for candidate in chosen:
        try:
            sizes[candidate.step] = desk.manifest(candidate).size
        except CheckpointError:
            # What is wrong with it is found below.
            sizes[candidate.step] = 0
    found = []
    with progress("verify", max(1, sum(sizes.values()) // MB), "MB") as bar:
        for candidate in chosen:
            found.append(verify(desk.folder, desk.lineage, candidate, desk.store))
            bar.advance(sizes[candidate.step] // MB, step=candidate.step)
    return found


@dataclass(frozen=True)
class Repaired:
    """What was to be done for a step."""

    step: int
    what: Mend
    failure: str
    """Why it could not be done."""


def repair_all(desk: Desk, chosen: Sequence[Candidate], dry_run: bool) -> list[Repaired]:
    """Verify and mend the steps, oldest first; what can't be mended is told and holds up no other."""
    done = []
    if not dry_run:
        desk.folder.prepare()
    for candidate, found in sorted(zip(chosen, verify_all(desk, chosen)), key=lambda pair: pair[1].step):
        what, failure = mend(found, desk.local_counts), ""
        if what is Mend.LOST or not dry_run:
            try:
                if desk.store is None:
                    raise CheckpointError("it has no place in the store yet; `vrt train` publishes and registers it")
                repair(desk.folder, desk.lineage, candidate, found, what, desk.store, desk.registry)
            except CheckpointError as error:
                failure = str(error)
        done.append(Repaired(candidate.step, what, failure))
    return done


def fetch_step(desk: Desk, step: int | None, to: Path | None) -> Path:
    """Bring a step, or the newest registered one, from the store into a folder: the lineage's own, or `to`.

    Raises CheckpointError where the step is not in the store, or its copy there is damaged.
    """
    if step is None:
        step = next((candidate.step for candidate in desk.known if candidate.registered), None)
        if step is None:
            raise CheckpointError(f"{desk.lineage}: nothing is registered yet")
    (candidate,) = desk.chosen([step])
    folder = CheckpointFolder(to) if to else desk.folder
    folder.prepare()
    # Sound is not enough: a save that was never registered may have been trained again elsewhere, to other bits.
    if step in folder.steps() and examine_local(folder, desk.lineage, replace(candidate, local=True)).state is State.HEALTHY:
        log.info("step %d is complete in %s already", step, folder.path)
        return folder.path
    if desk.store is None or candidate.address is None:
        raise CheckpointError(f"{desk.lineage}: step {step} is not in the store; it is only in {desk.folder.path}")
    if any(folder.path.glob(f"{step}_*")):
        folder.set_aside(step)
    if candidate.registered:
        with desk.registry.hold(step):
            fetch(folder, desk.lineage, candidate, desk.store)
    else:
        fetch(folder, desk.lineage, candidate, desk.store)
    return folder.path


def prune_by_policy(desk: Desk, policy: Checkpoints, dry_run: bool) -> list[Verdict]:
    """Delete what the params don't keep; with `dry_run` only say so."""
    damaged = _damaged_above_the_newest_healthy(desk, [candidate for candidate in desk.known if candidate.registered])
    verdicts = retain([candidate.registered for candidate in desk.known if candidate.registered], policy, damaged)
    if not dry_run and desk.store:
        prune(desk.folder, desk.store, desk.registry, policy, damaged)
    return verdicts


def prune_steps(desk: Desk, going: Sequence[Candidate], dry_run: bool) -> list[Verdict]:
    """Delete these steps everywhere, registered or not, newest first.

    Raises CheckpointError, and deletes nothing, where no healthy registered step would be left though there is one.
    """
    staying = [candidate for candidate in desk.known if candidate.registered and candidate not in going]
    if len(_damaged_above_the_newest_healthy(desk, staying)) == len(staying):
        for found in verify_all(desk, [candidate for candidate in going if candidate.registered]):
            if found.store.state is State.HEALTHY:
                raise CheckpointError(f"{desk.lineage}: step {found.step} is the last healthy one that is registered; nothing was deleted")
    if not dry_run:
        for candidate in going:
            delete(candidate, desk.folder, desk.store, desk.registry)
    return [Verdict(candidate.step, candidate not in going, "") for candidate in desk.known]


def _damaged_above_the_newest_healthy(desk: Desk, registered: Sequence[Candidate]) -> set[int]:
    """The steps, newest first, that are not healthy in the store, up to the first that is: one disk alone is no place to keep a training."""
    damaged: set[int] = set()
    for candidate in registered:
        (found,) = verify_all(desk, [candidate])
        if found.store.state is State.HEALTHY:
            break
        damaged.add(candidate.step)
    return damaged


def adopt_files(source: Path, params_path: Path) -> Manifest:
    """Make a checkpoint of the lineage of the params file of files without a manifest; `vrt train` registers it and goes on from it.

    Raises CheckpointError where the lineage has checkpoints already, or the files make none.
    """
    import torch

    params = load_params(params_path)
    lineage = lineage_of(params, PreparedData.open(PREPARED))
    registered = Curator(lineage).registered()
    folder = CheckpointFolder(CHECKPOINTS / lineage.id)
    folder.prepare()
    newest = max((*registered, *folder.steps()), default=None)
    if newest is not None:
        raise CheckpointError(
            f"{lineage.id}: it has checkpoints up to step {newest} already, and files from elsewhere can't continue them; adopt under another `name`"
        )
    return adopt(source, folder, lineage.id, build_state(params, torch.device("cpu")), lineage.identity, origin_here(lineage, "0"))
