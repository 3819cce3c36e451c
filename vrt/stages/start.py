"""How a training begins: as a new one, from its newest healthy checkpoint, from an older one, or as a fork."""

import difflib
import os
from collections.abc import Callable

from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.policy import AUTO, Kind, ResumePolicy
from vrt.checkpoint.registry import Sibling
from vrt.checkpoint.resume import Decision, newest_healthy
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import Lineage
from vrt.observe import log
from vrt.params import defines_the_training
from vrt.stages import CHECKPOINTS
from vrt.stages.adopt import complete_steps, steps_by_part
from vrt.training.loop import TrainingState
from vrt.training.session import Parts, put, read, read_what_fits

DVC_EXPERIMENT = "DVC_EXP_NAME"
"""`dvc exp run` names an experiment so to its stages."""

Note = Callable[[str, str], None]
"""Puts a text under a key on the MLflow run."""


def refuse_surprise(lineage: Lineage, policy: ResumePolicy) -> None:
    """Before anything of a new lineage exists: raise CheckpointError where an older one of its name was probably meant, saying what changed.

    `never` and `fork` ask for a new one, and so does whoever changes params for an experiment of DVC's: then it is only said.
    """
    registry = Curator(lineage)
    sibling = registry.sibling()
    if sibling is None or registry.attach() or registry.registered() or CheckpointFolder(CHECKPOINTS / lineage.id).steps():
        return
    changed = what_changed(sibling, lineage)
    if policy.kind in (Kind.NEVER, Kind.FORK) or (os.environ.get(DVC_EXPERIMENT) and policy.kind is Kind.AUTO):
        log.warning("this is a new training, %s is not continued; changed since: %s", sibling.lineage, "; ".join(changed))
        return
    listed = "".join(f"\n  {line}" for line in changed)
    raise CheckpointError(
        f"{lineage.name}: with these params it is another training than {sibling.lineage}, which has checkpoints up to step {sibling.step}; "
        f"changed since:{listed}\n"
        "To go on with that one, put these values back.\n"
        "To start another: at step 1 with `vrt train --resume never`, or from its weights with "
        f'`vrt train --resume "fork {sibling.lineage}@{sibling.step}"`; in params.yaml: checkpoints.resume, or another `name`.'
    )


def what_changed(sibling: Sibling, lineage: Lineage) -> list[str]:
    """Each value that makes `lineage` another training than its sibling, as `key: old -> new`."""
    if not sibling.params:
        return ["its run was deleted, so its params are not known"]
    keys = [*lineage.identity, *(key for key in sibling.params if key not in lineage.identity and defines_the_training(key))]
    old_and_new = [(key, sibling.params.get(key, "none"), str(lineage.identity.get(key, "none"))) for key in keys]
    return [f"{key}: {old} -> {new}" for key, old, new in old_and_new if old != new]


def resume(
    state: TrainingState,
    folder: CheckpointFolder,
    store: S3Store,
    registry: Curator,
    policy: ResumePolicy,
    total_steps: int,
    note: Note,
) -> bool:
    """Bring `state` to where `policy` lets it begin. False: that is step 1.

    What says how to begin (`ResumePolicy.begins`) was done if the run says so, and the newest checkpoint is next: the same command again
    continues what it started. Any other policy in between clears that.
    Raises CheckpointError where the policy can't be followed; the reasons are noted on the run, too.
    """
    lineage = registry.lineage.id
    again = policy.begins and begun(registry, policy)
    if again:
        way = "to begin so again, start once with `vrt train --resume auto` in between"
        log.info("%s: resume: %s was done by an earlier attempt; going on from the newest checkpoint (%s)", lineage, policy, way)
        policy = AUTO
    registered, published = registry.registered(), _published(store)
    refuse_to_go_back_to_nothing(lineage, {*folder.steps(), *registered, *published}, total_steps)
    parts: list[Parts] = []
    manifest = newest_healthy(
        folder,
        lineage,
        registered,
        store,
        total_steps,
        policy=policy,
        published=published,
        load=lambda manifest: parts.append(read(state, manifest, folder.path)),
        hold=registry.hold,
        tell=lambda decision: _note(decision, note),
    )
    if not again:
        # Only now is it done: what was refused must be refused the next time, too. And said at once: killed before the run says so, the next
        # attempt would begin so again, or refuse what this one has saved.
        registry.note("began", str(policy) if policy.begins else "")
    if manifest is None:
        if policy.kind is Kind.FORK:
            _fork(state, policy, store, total_steps)
        else:
            _keep_files_without_manifest(folder)
            log.info("%s: starting at step 1 of %d", lineage, total_steps)
        return policy.kind is Kind.FORK
    put(state, parts[-1])
    where = "registered" if manifest.step in registered else "local, about to be registered"
    log.info("%s, attempt %d: continuing after step %d of %d (%s)", lineage, registry.attempt, state.step, total_steps, where)
    newer = [step for step in registered if step > state.step]
    if policy.kind is Kind.STEP and newer:
        log.warning(
            "steps %d to %d stay registered and should come out the same again; one that doesn't is refused, unless it was deleted before "
            "(`vrt checkpoints prune --after %d`)",
            min(newer),
            max(newer),
            state.step,
        )
    return True


def refuse_to_go_back_to_nothing(lineage: str, steps: set[int], total_steps: int) -> None:
    """Raises CheckpointError where there are checkpoints, and all of them lie beyond the end of the training."""
    if steps and min(steps) > total_steps:
        listed = ", ".join(map(str, sorted(steps, reverse=True)[:10]))
        raise CheckpointError(
            f"{lineage}: train.total_steps is {total_steps}, and all its checkpoints lie beyond: {listed}; raise it to {min(steps)} or more to go "
            "on from them, or train under another `name`"
        )


def begun(registry: Curator, policy: ResumePolicy) -> bool:
    """Whether an earlier attempt has done what the policy says of how to begin."""
    return registry.noted("began") == str(policy)


def _keep_files_without_manifest(folder: CheckpointFolder) -> None:
    """A save that was cut off leaves such files, which nobody needs; but a person may have put them there: don't train over them."""
    assert not folder.steps(), "it starts at step 1 beside checkpoints"
    for step in complete_steps(steps_by_part(path.name for path in folder.path.iterdir())):
        aside = folder.set_aside(step, into="without-manifest")
        log.warning(
            "the files of step %d have no manifest: a save was cut off, or another program wrote them; moved to %s. "
            "To train on from them: stop, and run `vrt checkpoints adopt` on that folder (under another `name`, once this one has checkpoints)",
            step,
            aside,
        )


def _published(store: S3Store) -> dict[int, str]:
    try:
        return store.published()
    except StoreUnavailable as error:
        # What is local suffices to go on; what is only in the store and not registered was never promised.
        log.warning("what is published and not registered is not known: %s", error)
        return {}


def _note(decision: Decision, note: Note) -> None:
    if decision.step is not None:
        note("resumed", f"after step {decision.step} ({decision.source})")
    if decision.rejected:
        note("rejected", "\n".join(map(str, decision.rejected)))


def _fork(state: TrainingState, policy: ResumePolicy, store: S3Store, total_steps: int) -> None:
    """Bring `state` to a checkpoint of another lineage, as far as it fits; what is fetched for it stays in that lineage's folder."""
    if policy.step >= total_steps:
        raise CheckpointError(f"resume: {policy}: the fork goes on at step {policy.step + 1}; raise train.total_steps, which is {total_steps}")
    parent = Curator(lineage_named(policy.lineage))
    folder = CheckpointFolder(CHECKPOINTS / policy.lineage)
    registered = parent.registered()
    if not registered and not folder.steps():
        raise CheckpointError(f"resume: {policy}: {unknown_lineage(policy.lineage, parent)}")
    folder.prepare()
    found: list[tuple[Parts, list[str]] | CheckpointError] = []

    def load(manifest: Manifest) -> None:
        # What does not fit this network is sound all the same, and not ours to set aside.
        try:
            found.append(read_what_fits(state, manifest, folder.path))
        except CheckpointError as error:
            found.append(error)

    back = ResumePolicy(Kind.STEP, policy.step)
    newest_healthy(folder, policy.lineage, registered, store, max([*registered, policy.step]), policy=back, load=load, hold=parent.hold)
    if isinstance(found[-1], CheckpointError):
        raise found[-1]
    parts, left = found[-1]
    put(state, parts)
    log.info("forked %s: going on at step %d of %d", policy.parent, state.step + 1, total_steps)
    for line in left:
        log.warning("not taken from %s: %s", policy.parent, line)


def unknown_lineage(identifier: str, registry: Curator) -> str:
    """What to say to someone who names a lineage that has no checkpoints."""
    lineages = registry.lineages()
    near = difflib.get_close_matches(identifier, lineages, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no lineage {identifier} with checkpoints; {hint}known: {', '.join(lineages[:20]) or 'none'}"
