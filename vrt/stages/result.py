"""What a finished training leaves in the project folder: the model that DVC versions, and the report."""

import shutil
from pathlib import Path

from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import manifest_name
from vrt.checkpoint.tracking import Lineage
from vrt.observe import log
from vrt.params import Params, changes, same_training
from vrt.stages import MODEL, REPORTS
from vrt.stages.checkpoints import fetch_step, open_desk
from vrt.stages.reports import write_training_report
from vrt.training.history import History
from vrt.training.session import EMA, HISTORY, NETWORK, read_history
from vrt.typed_yaml import ParamsError


def leave_result(folder: CheckpointFolder, step: int, history: History) -> None:
    """Copy the weights of a checkpoint, with its manifest, into the folder that DVC versions as the trained model; and write the report.

    Raises CheckpointError where the folder has no such checkpoint.
    """
    manifest = folder.manifest(step)
    unfinished = MODEL.with_name(f".unfinished-{MODEL.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    weights = [file.name for file in manifest.files if file.name in (f"{step}_{NETWORK}", f"{step}_{EMA}")]
    for name in [*weights, manifest_name(step)]:
        shutil.copy2(folder.path / name, unfinished / name)
    if MODEL.exists():
        shutil.rmtree(MODEL)
    unfinished.replace(MODEL)
    write_training_report(REPORTS, history)


def has_result(lineage: Lineage, step: int) -> bool:
    """Whether the result of this step is here. Its checkpoint alone does not tell: who saved it may have been killed before this."""
    model = CheckpointFolder(MODEL)
    return model.steps() == [step] and model.manifest(step).lineage == lineage.id


def fetch_result(lineage: Lineage, params_path: Path, step: int) -> None:
    """Have the result of a training here that another machine led: its registered last step, verified digest by digest."""
    log.info("step %d of %s is trained and registered; fetching it, so that this machine has the result too", step, lineage.id)
    folder = fetch_step(open_desk(lineage.id, params_path), step, None)
    leave_result(CheckpointFolder(folder), step, read_history(folder / f"{step}_{HISTORY}"))


def changed_meanwhile(params_path: Path, written: Params, lineage: Lineage) -> bool:
    """Whether the params file no longer says what the training was `written` to do, so that it must leave no result.

    DVC reads the file when a stage has ended: it would take the result for one of params that the training did not know.
    Raises ParamsError where the file is now that of another training, which this one can't go on as.
    """
    changed = "; ".join(changes(params_path, written, Params.model_fields))
    if changed and not same_training(params_path, written):
        raise ParamsError(
            f"{params_path}: changed while {lineage.id} trained, into the params of another training: {changed}. All of it is registered; for its "
            "model and reports put these back and start it again, then change them"
        )
    if changed:
        log.warning("%s changed while this trained; start it again, and it goes on by: %s", params_path, changed)
    return bool(changed)
