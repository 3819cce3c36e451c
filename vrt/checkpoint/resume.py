"""Which step a training continues from, and why not from a newer one."""

from collections.abc import Mapping
from dataclasses import dataclass

from vrt.checkpoint.errors import CheckpointError, FolderUnavailable, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.store import Store
from vrt.observe import log


@dataclass(frozen=True)
class Registered:
    """A checkpoint as the registry has it."""

    step: int
    digest: str
    address: str


@dataclass(frozen=True)
class Candidate:
    """One step that might be continued from."""

    step: int
    local: bool
    """There is a local manifest of this step."""
    registered: Registered | None


def candidates(local: list[int], registered: Mapping[int, Registered], last_step: int) -> list[Candidate]:
    """Every step up to `last_step` that the local folder or the registry claims to have, newest first."""
    steps = sorted({step for step in (*local, *registered) if step <= last_step}, reverse=True)
    return [Candidate(step, step in local, registered.get(step)) for step in steps]


def newest_healthy(folder: CheckpointFolder, lineage: str, registered: Mapping[int, Registered], store: Store, last_step: int) -> Manifest | None:
    """The newest checkpoint whose bytes verify, complete in `folder`; None where there is none at all.

    A damaged local one is moved aside and fetched again where the registry has it. Each rejection is logged with its reason.
    Raises CheckpointError where checkpoints exist and none is healthy: starting over silently would hide the loss.
    Raises StoreUnavailable where a registered checkpoint can't be fetched because the store does not answer.
    """
    rejected = []
    for candidate in candidates(folder.steps(), registered, last_step):
        problems = _make_healthy(folder, lineage, candidate, store)
        if not problems:
            return folder.manifest(candidate.step)
        rejected.append(f"step {candidate.step}: {'; '.join(problems)}")
        log.warning("not continuing from step %d: %s", candidate.step, "; ".join(problems))
    if rejected:
        raise CheckpointError(
            f"{lineage}: no healthy checkpoint among {len(rejected)}:\n  " + "\n  ".join(rejected) + "\n"
            f"restore one of them, or start over under another `name` in the params file; damaged local files are in {folder.path / 'damaged'}"
        )
    damaged = folder.path / "damaged"
    if damaged.exists():
        # The run that set them aside refused too; a second try must not start over silently.
        raise CheckpointError(f"{lineage}: its only checkpoints are damaged, in {damaged}; restore one, or remove that folder to start at step 1")
    return None


def _make_healthy(folder: CheckpointFolder, lineage: str, candidate: Candidate, store: Store) -> list[str]:
    """See that the candidate is complete and sound in the folder; returns why that can't be done."""
    problems: list[str] = []
    if candidate.local:
        problems = folder.problems(candidate.step, lineage)
        if not problems and candidate.registered and folder.manifest(candidate.step).digest != candidate.registered.digest:
            problems = ["it has other content than the step registered under this lineage"]
        if not problems:
            return []
        aside = folder.set_aside(candidate.step)
        log.warning("local checkpoint %d is damaged (%s); moved to %s", candidate.step, "; ".join(problems), aside)
    if candidate.registered is None:
        return problems
    try:
        manifest = store.manifest(candidate.registered.address)
        if manifest.digest != candidate.registered.digest:
            return [*problems, f"the manifest at {candidate.registered.address} is not the one registered"]
        folder.receive(manifest, lambda file, path: store.fetch(candidate.registered.address, file, path))
    except (StoreUnavailable, FolderUnavailable):
        # The checkpoint may be sound: going on from an older one would lose what the user can still have.
        raise
    except CheckpointError as error:
        return [*problems, f"its registered copy: {error}"]
    log.info("fetched registered checkpoint %d from %s", candidate.step, candidate.registered.address)
    return []
