"""`vrt checkpoints adopt`: make a checkpoint of files that KAIR, or any program that names them so, left without a manifest."""

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.policy import AUTO
from vrt.checkpoint.resume import Candidate, Evidence, Side, State, decide
from vrt.checkpoint.weights import TRAINED
from vrt.observe import log
from vrt.training.loop import TrainingState
from vrt.training.session import EMA, HISTORY, NETWORK, OPTIMIZER, load_fitting, load_optimizer

PARTS = (NETWORK, EMA, OPTIMIZER)


def adopt(source: Path, folder: CheckpointFolder, lineage: str, state: TrainingState, identity: Mapping, origin: Mapping[str, str]) -> Manifest:
    """Copy the newest set of files in `source` that agree and fit `state` into `folder`, with a manifest. `state` is not changed.

    G and the optimizer are needed, E where the folder has any: a network, its average and its moments of different steps are no state
    that a training ever had. Raises CheckpointError, naming each step with what is wrong, where there is no such set.
    """
    found = steps_by_part(path.name for path in source.iterdir()) if source.is_dir() else {}
    steps = sorted({step for steps in found.values() for step in steps}, reverse=True)
    if not steps:
        raise CheckpointError(f"{source}: expected files such as 2000_{NETWORK} and 2000_{OPTIMIZER}, found none")
    if warning := disagreement(found):
        log.warning("%s: %s", source, warning)
    decision = decide(AUTO, lineage, [Candidate(step, True, None) for step in steps], lambda one: _examine(source, one.step, found, state))
    for rejection in decision.rejected:
        log.warning("not adopting %s", rejection)
    if decision.step is None:
        reasons = "\n  ".join(map(str, decision.rejected))
        raise CheckpointError(f"{source}: no step can be adopted:\n  {reasons}")
    step = decision.step
    if step in folder.steps():
        raise CheckpointError(f"{folder.path}: step {step} is there already; `vrt checkpoints show {step}` tells about it")
    contents: dict[str, Callable] = {part: _copy(source / f"{step}_{part}") for part in _needed(found)}
    # KAIR keeps its curves in a log file; ours begin here.
    contents[HISTORY] = lambda file: file.write(b"")
    created = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "adopted": "files without a manifest"}

    def describe(files: tuple[FileEntry, ...]) -> Manifest:
        return Manifest(lineage, step, files, {}, dict(identity), dict(origin) | created)

    return folder.commit(step, contents, describe)


def steps_by_part(names: Iterable[str]) -> dict[str, set[int]]:
    """The steps of which there is each part, such as {"G.pth": {1000, 2000}}."""
    found: dict[str, set[int]] = {part: set() for part in PARTS}
    for name in names:
        if (match := re.fullmatch(r"(\d+)_(.+)", name)) and match[2] in found:
            found[match[2]].add(int(match[1]))
    return found


def complete_steps(found: Mapping[str, set[int]]) -> list[int]:
    """The steps with all parts that are needed, newest first."""
    return sorted(set.intersection(*(found[part] for part in _needed(found))), reverse=True)


def disagreement(found: Mapping[str, set[int]]) -> str:
    """The newest step of each part, in words, where these differ; else nothing."""
    newest = {part: max(steps) for part, steps in found.items() if steps}
    if len(set(newest.values())) <= 1:
        return ""
    return f"the newest files disagree: {', '.join(f'{part} {step}' for part, step in newest.items())}; taking the newest step at which they agree"


def _needed(found: Mapping[str, set[int]]) -> list[str]:
    return [part for part in PARTS if part != EMA or found[EMA]]


def _examine(source: Path, step: int, found: Mapping[str, set[int]], state: TrainingState) -> Evidence:
    nowhere = Side(State.MISSING)
    missing = tuple(f"{step}_{part} is missing" for part in _needed(found) if step not in found[part])
    if missing:
        return Evidence(Side(State.DAMAGED, missing), nowhere)
    try:
        load_fitting(source / f"{step}_{NETWORK}", state.network, TRAINED)
        if state.ema is not None and found[EMA]:
            load_fitting(source / f"{step}_{EMA}", state.ema)
        load_optimizer(source / f"{step}_{OPTIMIZER}", state)
    except CheckpointError as error:
        return Evidence(Side(State.UNUSABLE, (str(error),)), nowhere)
    return Evidence(Side(State.HEALTHY), nowhere)


def _copy(path: Path) -> Callable:
    def write(file) -> None:
        with path.open("rb") as original:
            shutil.copyfileobj(original, file, 1 << 20)

    return write
