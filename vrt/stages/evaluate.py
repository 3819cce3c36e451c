"""`vrt evaluate`: restore the test clips with the trained model and measure them against the truth."""

import json
from pathlib import Path

import torch
from rich.console import Console

from vrt.checkpoint.curator import Curator
from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.serialize import sha256_of
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import Lineage
from vrt.data.cli import RAW
from vrt.data.clips import PreparedData
from vrt.data.prepare import prepare, raw_digest
from vrt.evaluation.report import clip_records, summary_table, write_report
from vrt.evaluation.run import Evaluation, evaluate
from vrt.lifecycle import EXIT_CONTINUE_ME, EXIT_DONE
from vrt.observe import log
from vrt.params import Params, changes, fingerprint, load_params
from vrt.stages import MODEL, PREPARED, REPORTS
from vrt.stages.provenance import folder_of
from vrt.stages.selector import Chosen, choose
from vrt.training.session import build_network, load_fitting, released

READ = ("name", "degradation", "network", "evaluate")
"""The sections and keys of params that an evaluation depends on, as dvc.yaml lists them."""
OTHERS = Path("data/.prepared-for-evaluation")
"""Data sets that are only evaluated on."""


def run_evaluation(params_path: Path, checkpoint: str | None = None, dataset: str | None = None) -> int:
    """Evaluate the model that DVC versions; writes reports/evaluation/ and enters the means into the MLflow run.

    With `checkpoint` (`vrt.stages.selector`), evaluate that instead, on the test clips of data set `dataset` (None: the prepared one);
    writes reports/evaluation-of-CHECKPOINT-on-DATASET/ alone, and enters the means into the checkpoint's run and version.

    Raises ValueError (params, data, model, checkpoint), whose message is for the user.
    """
    if checkpoint:
        measured = measure_checkpoint(choose(checkpoint, params_path), dataset)
        Console().print(summary_table(measured))
        return EXIT_DONE
    params = load_params(params_path)
    data = PreparedData.open(PREPARED)
    network, manifest = load_model(params)
    evaluation = measure(network, data, params)
    if changed := changes(params_path, params, READ):
        # DVC reads the file when a stage has ended: it would take this report for one of params that it does not know.
        log.warning("%s changed while this evaluated; start it again: %s", params_path, "; ".join(changed))
        return EXIT_CONTINUE_ME
    write_report(evaluation, REPORTS / "evaluation")
    Console().print(summary_table(evaluation))
    _record(params.name, data.index.dataset, manifest, evaluation)
    return EXIT_DONE


def measure_checkpoint(chosen: Chosen, dataset: str | None) -> Evaluation:
    """Evaluate a checkpoint on the test clips of a data set (None: that of the params file), write a report, and tell MLflow."""
    name = dataset or chosen.params.data.dataset
    data = test_clips(name, chosen.params)
    log.info("%s on the test clips of %s", chosen.name, name)
    evaluation = measure(chosen.network, data, chosen.params)
    write_report(evaluation, REPORTS / f"evaluation-of-{chosen.name}-on-{name}")
    if chosen.desk and chosen.candidate and chosen.candidate.registered:
        registry, step, means = chosen.desk.registry, chosen.candidate.step, evaluation.metrics()
        registry.tag(step, {f"test_{name}_{key}": f"{means[key]:.6g}" for key in ("psnr", "ssim")})
        if registry.attach():
            registry.record(step, {f"test-{name}/{key}": value for key, value in means.items()})
            _put_table(registry, step, name, evaluation)
    return evaluation


def measure(network: torch.nn.Module, data: PreparedData, params: Params) -> Evaluation:
    """On the GPU, if there is one."""
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate(network, data, params, "test")


def test_clips(name: str, params: Params) -> PreparedData:
    """The data set below data/raw/, prepared: in data/prepared/ where that is the one of the params file, else in a folder of its own."""
    # Where the params file was changed since, it is still another one.
    if name == params.data.dataset and PREPARED.exists() and (data := PreparedData.open(PREPARED)).index.dataset == name:
        return data
    prepared, made_of, source = OTHERS / name, OTHERS / f"{name}.source", raw_digest(RAW / name)
    if not (prepared / "index.json").exists() or not made_of.exists() or made_of.read_text() != source:
        prepare(RAW / name, prepared)
        made_of.write_text(source)
    return PreparedData.open(prepared)


def load_model(params: Params) -> tuple[torch.nn.Module, Manifest]:
    """The released network (E where it was kept, else G) and the manifest of the checkpoint it came from.

    Raises CheckpointError where `model/` has none, or other bytes than its manifest says.
    """
    folder = CheckpointFolder(MODEL)
    if not folder.steps():
        raise CheckpointError(f"{MODEL}: no trained model here; run `dvc repro train` (or `dvc pull` where it was trained elsewhere)")
    manifest = folder.manifest(folder.steps()[0])
    file = released(manifest)
    path = MODEL / file.name
    if not path.is_file() or sha256_of(path) != file.sha256:
        raise CheckpointError(f"{path}: missing, or not what its manifest says; run `dvc checkout {MODEL}`, or `dvc repro train` to write it again")
    network = build_network(params.network)
    network.load_state_dict(load_fitting(path, network))
    return network, manifest


def _record(name: str, dataset: str, manifest: Manifest, evaluation: Evaluation) -> None:
    registry = Curator(Lineage(name, fingerprint(manifest.identity), manifest.identity))
    try:
        if registry.attach():
            registry.record(manifest.step, {f"test/{key}": value for key, value in evaluation.metrics().items()})
            _put_table(registry, manifest.step, dataset, evaluation)
            _complete_provenance(registry)
    except StoreUnavailable as error:
        # The numbers are in the report that DVC versions; the run is where people look, not where results live.
        log.warning("the test results are not in the MLflow run: %s", error)


def _put_table(registry: Curator, step: int, dataset: str, evaluation: Evaluation) -> None:
    """Keep the results of every clip with the run, as a table that MLflow's pages show."""
    records, name = clip_records(evaluation), f"step-{step}-on-{dataset}.json"
    content = json.dumps({"columns": list(records[0]), "data": [list(record.values()) for record in records]}).encode()
    S3Store(registry.checkpoints_address).put_beside(f"{registry.artifacts_address}/evaluation", {name: content})
    registry.show_table(f"evaluation/{name}")


def _complete_provenance(registry: Curator) -> None:
    """Keep dvc.lock with the run once more: while the training ran, its own result was not in it yet."""
    lock = Path("dvc.lock")
    if lock.exists():
        folder = folder_of(registry.artifacts_address, registry.attempts())
        S3Store(registry.checkpoints_address).put_beside(folder, {lock.name: lock.read_bytes()})
