"""A checkpoint as people name it: latest, best, champion, LINEAGE@STEP, RUN@STEP, or a file of weights."""

import re
from dataclasses import dataclass
from pathlib import Path

from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.lock import in_turn
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.registry import BEST, CHAMPION, LATEST_STEP
from vrt.checkpoint.resume import Candidate, State, examine_local
from vrt.checkpoint.serialize import sha256_of
from vrt.checkpoint.weights import SAFETENSORS
from vrt.model.network import VRT
from vrt.params import Params, load_params, trained_as
from vrt.stages import CHECKPOINTS
from vrt.stages.checkpoints import Desk, fetch_step, open_desk
from vrt.training.session import build_network, load_fitting, released

FETCHED = CHECKPOINTS / "fetched"
"""Checkpoints that were only used, apart from those of trainings in this folder."""
ALIASES = {"latest": LATEST_STEP, "best": BEST, "champion": CHAMPION}
HOW_TO_NAME = f"{', '.join(ALIASES)}, LINEAGE@STEP, RUN@STEP, or a file of weights (.pth or {SAFETENSORS})"


@dataclass(frozen=True)
class Chosen:
    """A network with its weights, and the params it was trained by: those of its checkpoint, with the rest from the params file."""

    name: str
    """LINEAGE@STEP, or the file's name."""
    network: VRT
    params: Params
    sha256: str
    """Of the file of weights."""
    desk: Desk | None
    """Of its lineage; None: it is a file."""
    candidate: Candidate | None


def choose(selector: str, params_path: Path) -> Chosen:
    """Find a checkpoint, fetch it unless it is here, verify it, and load its network: E where it was kept, else G.

    Raises CheckpointError or ParamsError, which say what was found instead and what to do.
    """
    params = load_params(params_path)
    file = Path(selector)
    if file.suffix in (".pth", SAFETENSORS):
        network = build_network(params.network)
        network.load_state_dict(load_fitting(file, network))
        return Chosen(file.stem, network, params, sha256_of(file), None, None)
    desk, candidate = find(selector, params, params_path)
    folder, manifest = _bring(desk, candidate)
    own = trained_as(params, manifest.identity)
    weights = released(manifest)
    if weights is None:
        raise CheckpointError(f"{manifest.lineage} step {manifest.step}: it has no weights")
    network = build_network(own.network)
    network.load_state_dict(load_fitting(folder / weights.name, network))
    return Chosen(f"{manifest.lineage}@{manifest.step}", network, own, weights.sha256, desk, candidate)


def find(selector: str, params: Params, params_path: Path) -> tuple[Desk, Candidate]:
    """The lineage and the step that a selector means. Raises CheckpointError where there is none."""
    named = re.fullmatch(r"(.+)@([0-9]+)", selector)
    if selector in ALIASES:
        # Of a name, not of a lineage: the fingerprint is not needed, so nothing has to be prepared.
        registry = Curator(lineage_named(f"{params.name}-0"))
        lineage, step = _led_to(registry, ALIASES[selector])
    elif named:
        lineage, step = named[1], int(named[2])
        if re.fullmatch(r"[0-9a-f]{32}", lineage):
            lineage = Curator(lineage_named(f"{params.name}-0")).lineage_of_run(lineage)
    else:
        raise CheckpointError(f"checkpoint {selector!r}: expected {HOW_TO_NAME}; found no such name and no such file")
    desk = open_desk(lineage, params_path)
    (candidate,) = desk.chosen([step])
    return desk, candidate


def _led_to(registry: Curator, alias: str) -> tuple[str, int]:
    found = registry.led_to(alias)
    if found is None:
        remedy = "make one with `vrt promote`" if alias == CHAMPION else "`vrt train` registers some"
        raise CheckpointError(f"{registry.lineage.model}: no version has the alias {alias}; {remedy}, or name a checkpoint as LINEAGE@STEP")
    return found


def _bring(desk: Desk, candidate: Candidate) -> tuple[Path, Manifest]:
    """A folder that has the step complete and undamaged, and its manifest."""
    step = candidate.step
    if examine_local(desk.folder, desk.lineage, candidate).state is State.HEALTHY:
        return desk.folder.path, desk.folder.manifest(step)
    # Not into the lineage's own folder, where a trainer may be at work.
    with in_turn(FETCHED / desk.lineage):
        folder = fetch_step(desk, step, FETCHED / desk.lineage)
        return folder, CheckpointFolder(folder).manifest(step)
