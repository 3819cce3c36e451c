"""`vrt evaluate`: restore the test clips with the trained model and measure them against the truth."""

from pathlib import Path

import torch
from rich.console import Console

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.registry import MlflowRegistry
from vrt.checkpoint.serialize import sha256_of
from vrt.checkpoint.tracking import Lineage
from vrt.data.clips import PreparedData
from vrt.evaluation.report import summary_table, write_report
from vrt.evaluation.run import evaluate
from vrt.lifecycle import EXIT_DONE
from vrt.observe import log
from vrt.params import Params, fingerprint, load_params
from vrt.stages import MODEL, PREPARED, REPORTS
from vrt.training.session import EMA, NETWORK, build_network, load_fitting


def run_evaluation(params_path: Path, weights: Path | None = None) -> int:
    """Evaluate the model that DVC versions; writes reports/evaluation/ and enters the means into the MLflow run.

    With `weights`, a file of the params file's network, evaluate that instead, and write to reports/evaluation-of-NAME/ alone.

    Raises ValueError (params, data, model), whose message is for the user.
    """
    params = load_params(params_path)
    data = PreparedData.open(PREPARED)
    if weights:
        network, manifest = build_network(params.network), None
        network.load_state_dict(load_fitting(weights, network))
    else:
        network, manifest = load_model(params)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = evaluate(network, data, params, "test")
    write_report(evaluation, REPORTS / (f"evaluation-of-{weights.stem}" if weights else "evaluation"))
    Console().print(summary_table(evaluation))
    if manifest:
        _record(params, manifest, evaluation.metrics())
    return EXIT_DONE


def load_model(params: Params) -> tuple[torch.nn.Module, Manifest]:
    """The released network (E where it was kept, else G) and the manifest of the checkpoint it came from."""
    folder = CheckpointFolder(MODEL)
    if not folder.steps():
        raise CheckpointError(f"{MODEL}: no trained model here; run `dvc repro train` (or `dvc pull` where it was trained elsewhere)")
    manifest = folder.manifest(folder.steps()[0])
    file = manifest.file(f"_{EMA}") or manifest.file(f"_{NETWORK}")
    path = MODEL / file.name
    if not path.is_file() or sha256_of(path) != file.sha256:
        raise CheckpointError(f"{path}: missing, or not what its manifest says; run `dvc checkout {MODEL}`, or `dvc repro train` to write it again")
    network = build_network(params.network)
    network.load_state_dict(load_fitting(path, network))
    return network, manifest


def _record(params: Params, manifest: Manifest, metrics: dict[str, float]) -> None:
    registry = MlflowRegistry(Lineage(params.name, fingerprint(manifest.identity), manifest.identity))
    try:
        if registry.attach():
            registry.record(manifest.step, {f"test/{key}": value for key, value in metrics.items()})
    except StoreUnavailable as error:
        # The numbers are in the report that DVC versions; the run is where people look, not where results live.
        log.warning("the test results are not in the MLflow run: %s", error)
