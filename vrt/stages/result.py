"""What a finished training leaves in the project folder: the model that DVC versions, and the report."""

import shutil
from pathlib import Path

from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import manifest_name
from vrt.checkpoint.tracking import Lineage
from vrt.observe import log
from vrt.stages import MODEL, REPORTS
from vrt.stages.checkpoints import fetch_step, open_desk
from vrt.stages.reports import write_training_report
from vrt.training.history import History
from vrt.training.session import EMA, HISTORY, NETWORK, read_history


def leave_result(folder: CheckpointFolder, step: int, history: History) -> None:
    """Copy the weights of a checkpoint, with its manifest, into the folder that DVC versions as the trained model; and write the report."""
    unfinished = MODEL.with_name(f".unfinished-{MODEL.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in (f"{step}_{NETWORK}", f"{step}_{EMA}", manifest_name(step)):
        if (folder.path / name).exists():
            shutil.copy2(folder.path / name, unfinished / name)
    if MODEL.exists():
        shutil.rmtree(MODEL)
    unfinished.replace(MODEL)
    write_training_report(REPORTS, history)


def fetch_result(lineage: Lineage, params_path: Path, step: int) -> None:
    """Have the result of a training here that another machine led: its registered last step, verified digest by digest."""
    log.info("step %d of %s is trained and registered; fetching it, so that this machine has the result too", step, lineage.id)
    folder = fetch_step(open_desk(lineage.id, params_path), step, None)
    leave_result(CheckpointFolder(folder), step, read_history(folder / f"{step}_{HISTORY}"))
