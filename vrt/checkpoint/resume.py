"""Which step a training continues from, why, and why not from each newer one.

`decide` is the decision, a pure function; `newest_healthy` is the shell around it that examines, fetches and sets aside.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum

from vrt.checkpoint.errors import CheckpointError, FolderUnavailable, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.policy import AUTO, Kind, ResumePolicy
from vrt.checkpoint.store import Store
from vrt.observe import log


@dataclass(frozen=True)
class Registered:
    """A checkpoint as the registry has it."""

    step: int
    digest: str
    address: str
    psnr: float | None = None
    """Validation PSNR in dB, where it was validated."""
    pinned: bool = False
    """A person wants it kept."""
    held: bool = False
    """Somebody is downloading it."""
    champion: bool = False
    """The one that `vrt promote` chose."""


@dataclass(frozen=True)
class Candidate:
    """One step that might be continued from, by what registry, local folder and store claim to have."""

    step: int
    local: bool
    """There is a local manifest of this step."""
    registered: Registered | None
    published: str | None = None
    """Its address in the store, where it has a manifest there and is not registered: its trainer was killed in between."""

    @property
    def address(self) -> str | None:
        """Where the store has it; None: nothing says that it does."""
        return self.registered.address if self.registered else self.published


class State(StrEnum):
    """How one side's copy of a checkpoint is."""

    HEALTHY = "healthy"
    MISSING = "missing"
    DAMAGED = "damaged"
    UNUSABLE = "unusable"
    """All bytes are as the manifest says, and no training can continue from them: another network's, incomplete, or a pickle of code."""


@dataclass(frozen=True)
class Side:
    """What one side, the local folder or the store, really has of a step."""

    state: State
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What came out of examining both sides of a step."""

    local: Side
    store: Side

    @property
    def source(self) -> "Source | None":
        """Where to take the step from; None: nowhere."""
        if self.local.state is State.HEALTHY:
            return Source.LOCAL
        return Source.STORE if self.store.state is State.HEALTHY else None

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with either side, in words; the local one's come first."""
        return self.local.problems + self.store.problems


class Source(StrEnum):
    """The side that a checkpoint is taken from."""

    LOCAL = "local"
    STORE = "store"


@dataclass(frozen=True)
class Rejection:
    """A step that a training can't go on from, and all that is wrong with it."""

    step: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.step}: {'; '.join(self.problems)}"


@dataclass(frozen=True)
class Decision:
    """Continue after `step` from `source`; start at step 1 where both are None; or don't start at all, because of `error`."""

    step: int | None = None
    source: Source | None = None
    rejected: tuple[Rejection, ...] = ()
    """Each newer step, and why it can't be continued from."""
    error: str = ""


def candidates(
    local: Sequence[int], registered: Mapping[int, Registered], last_step: int, published: Mapping[int, str] | None = None
) -> list[Candidate]:
    """Every step up to `last_step` that the local folder, the registry or the store claims to have, newest first."""
    published = {step: address for step, address in (published or {}).items() if step not in registered}
    steps = sorted({step for step in (*local, *registered, *published) if step <= last_step}, reverse=True)
    return [Candidate(step, step in local, registered.get(step), published.get(step)) for step in steps]


def decide(policy: ResumePolicy, lineage: str, known: Sequence[Candidate], examine: Callable[[Candidate], Evidence]) -> Decision:
    """The decision of `policy` over the candidates, newest first.

    `examine` tells what is really there of one; it is costly, so it is asked from the newest on, until one is healthy.
    """
    if policy.kind is Kind.NEVER and known:
        return Decision(
            error=f"{lineage}: resume is never, but there are checkpoints up to step {known[0].step}, which a start at step 1 would only repeat; "
            "set checkpoints.resume: auto to go on from them, or another `name` or `seed` for another training"
        )
    wanted = known
    if policy.kind is Kind.STEP:
        wanted = [candidate for candidate in known if candidate.step == policy.step]
        if not wanted:
            steps = ", ".join(str(candidate.step) for candidate in known) or "none"
            return Decision(error=f"{lineage}: resume is {policy.step}, but there is no such checkpoint; found: {steps}")
    rejected: list[Rejection] = []
    for candidate in wanted:
        evidence = examine(candidate)
        if evidence.source:
            return Decision(candidate.step, evidence.source, tuple(rejected))
        rejected.append(Rejection(candidate.step, evidence.problems))
    return Decision(rejected=tuple(rejected), error=_without_any(policy, lineage, rejected, known))


def _without_any(policy: ResumePolicy, lineage: str, rejected: Sequence[Rejection], known: Sequence[Candidate]) -> str:
    reasons = "\n  ".join(str(rejection) for rejection in rejected)
    if policy.kind is Kind.STEP:
        others = ", ".join(str(candidate.step) for candidate in known if candidate.step != policy.step) or "none"
        return f"{lineage}: resume is {policy.step}, which can't be used:\n  {reasons}\nother steps: {others}"
    if rejected:
        # Starting over silently would hide the loss.
        return (
            f"{lineage}: no healthy checkpoint among {len(rejected)}:\n  {reasons}\n"
            "restore one of them, or start over under another `name` in the params file"
        )
    if policy.kind is Kind.MUST:
        return (
            f"{lineage}: resume is must, but there is no checkpoint of this training in the registry, the store or this folder; "
            "set checkpoints.resume: auto to start at step 1"
        )
    return ""


def newest_healthy(
    folder: CheckpointFolder,
    lineage: str,
    registered: Mapping[int, Registered],
    store: Store,
    last_step: int,
    *,
    policy: ResumePolicy = AUTO,
    published: Mapping[int, str] | None = None,
    load: Callable[[Manifest], object] = lambda manifest: None,
    hold: Callable[[int], AbstractContextManager] = nullcontext,
    tell: Callable[[Decision], None] = lambda decision: None,
) -> Manifest | None:
    """The checkpoint to continue from, complete in `folder`; None where the training starts at step 1.

    `load` raises CheckpointError where a training can't continue from a checkpoint whose bytes are right; `hold` keeps a registered one from
    being deleted while it is fetched; `tell` gets the decision. Damaged local files are moved aside. Each rejection is logged.
    Raises CheckpointError where the decision is not to start.
    Raises StoreUnavailable where a checkpoint can't be fetched because the store does not answer.
    """
    known = candidates(folder.steps(), registered, last_step, published)
    examined: dict[int, Evidence] = {}
    aside: set[int] = set()

    def examine(candidate: Candidate) -> Evidence:
        if candidate.step not in examined:
            examined[candidate.step] = _examine(folder, lineage, candidate, store, load)
        return examined[candidate.step]

    while True:
        decision = decide(policy, lineage, known, examine)
        for candidate in known:
            if candidate.step not in aside and _spoils(examined.get(candidate.step), candidate):
                aside.add(candidate.step)
                _set_aside(folder, candidate.step, examined[candidate.step].local)
        if decision.source is not Source.STORE:
            break
        candidate = next(candidate for candidate in known if candidate.step == decision.step)
        with hold(candidate.step) if candidate.registered else nullcontext():
            arrived = _arrived(folder, lineage, candidate, store, load)
        if arrived.state is State.HEALTHY:
            break
        if arrived.state is State.DAMAGED:
            examined[candidate.step] = replace(examined[candidate.step], store=arrived)
        else:
            # The bytes are in the folder now.
            examined[candidate.step] = Evidence(arrived, Side(State.MISSING))
            aside.discard(candidate.step)
    return _concluded(folder, lineage, decision, tell)


def _concluded(folder: CheckpointFolder, lineage: str, decision: Decision, tell: Callable[[Decision], None]) -> Manifest | None:
    for rejection in decision.rejected:
        log.warning("not continuing from %s", rejection)
    tell(decision)
    damaged = folder.path / "damaged"
    if decision.error:
        raise CheckpointError(decision.error + (f"; damaged local files are in {damaged}" if damaged.exists() else ""))
    if decision.step is None and damaged.exists():
        # The run that set them aside refused too; a second try must not start over silently.
        raise CheckpointError(f"{lineage}: its only checkpoints are damaged, in {damaged}; restore one, or remove that folder to start at step 1")
    return None if decision.step is None else folder.manifest(decision.step)


def _examine(folder: CheckpointFolder, lineage: str, candidate: Candidate, store: Store, load: Callable[[Manifest], object]) -> Evidence:
    """Look at a candidate: at every byte of its local files, and, only where those won't do, at its manifest in the store."""
    local = examine_local(folder, lineage, candidate)
    if local.state is State.HEALTHY and (problems := _unusable(load, folder.manifest(candidate.step))):
        local = Side(State.UNUSABLE, problems)
    # What the store has of an unusable one is the same bytes.
    if local.state in (State.HEALTHY, State.UNUSABLE) or candidate.address is None:
        return Evidence(local, Side(State.MISSING))
    try:
        published_manifest(store, lineage, candidate)
    except CheckpointError as error:
        return Evidence(local, Side(State.DAMAGED, (_of_the_copy(candidate, error),)))
    return Evidence(local, Side(State.HEALTHY))


def examine_local(folder: CheckpointFolder, lineage: str, candidate: Candidate) -> Side:
    """Whether the local files are all that their manifest says, and what is registered."""
    if not candidate.local:
        return Side(State.MISSING)
    problems = folder.problems(candidate.step, lineage)
    if not problems and candidate.registered and folder.manifest(candidate.step).digest != candidate.registered.digest:
        problems = ["it has other content than the step registered under this lineage"]
    return Side(State.DAMAGED, tuple(problems)) if problems else Side(State.HEALTHY)


def published_manifest(store: Store, lineage: str, candidate: Candidate) -> Manifest:
    """A candidate's manifest in the store. Raises CheckpointError where it is not that of the registered step."""
    assert candidate.address is not None
    manifest = store.manifest(candidate.address)
    if candidate.registered and manifest.digest != candidate.registered.digest:
        raise CheckpointError(f"the manifest at {candidate.address} is not the one registered")
    if (manifest.lineage, manifest.step) != (lineage, candidate.step):
        raise CheckpointError(f"the manifest at {candidate.address} is of {manifest.lineage} step {manifest.step}")
    return manifest


def _arrived(folder: CheckpointFolder, lineage: str, candidate: Candidate, store: Store, load: Callable[[Manifest], object]) -> Side:
    """The candidate after fetching it. Damaged: nothing arrived; else it is there, and perhaps unusable."""
    try:
        manifest = fetch(folder, lineage, candidate, store)
    except (StoreUnavailable, FolderUnavailable):
        # The checkpoint may be sound: going on from an older one would lose what the user can still have.
        raise
    except CheckpointError as error:
        return Side(State.DAMAGED, (_of_the_copy(candidate, error),))
    problems = _unusable(load, manifest)
    return Side(State.UNUSABLE, problems) if problems else Side(State.HEALTHY)


def fetch(folder: CheckpointFolder, lineage: str, candidate: Candidate, store: Store) -> Manifest:
    """Bring a candidate from the store into `folder`. Raises CheckpointError where the copy there is no good: then nothing of it is left."""
    manifest = published_manifest(store, lineage, candidate)
    folder.receive(manifest, lambda file, path: store.fetch(candidate.address, file, path))
    log.info("fetched %s checkpoint %d from %s", "registered" if candidate.registered else "published", candidate.step, candidate.address)
    return manifest


def _of_the_copy(candidate: Candidate, error: CheckpointError) -> str:
    return f"its {'registered' if candidate.registered else 'published'} copy: {error}"


def _unusable(load: Callable[[Manifest], object], manifest: Manifest) -> tuple[str, ...]:
    try:
        load(manifest)
    except CheckpointError as error:
        return (str(error),)
    return ()


def _spoils(evidence: Evidence | None, candidate: Candidate) -> bool:
    """Local files that are damaged, or that would be registered though no training can continue from them."""
    state = evidence.local.state if evidence else None
    return state is State.DAMAGED or (state is State.UNUSABLE and not candidate.registered)


def _set_aside(folder: CheckpointFolder, step: int, side: Side) -> None:
    aside = folder.set_aside(step)
    log.warning("local checkpoint %d is %s (%s); moved to %s", step, side.state, "; ".join(side.problems), aside)
