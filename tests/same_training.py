"""What trainings there are, and whether two came out the same, bit by bit, in their files and in MLflow."""

import torch
from mlflow import MlflowClient

DETERMINISTIC = ("train/loss", "train/lr", "val/psnr", "val/ssim")


def lineage_folder(workspace):
    (folder,) = (path for path in (workspace.root / "checkpoints").iterdir() if path.is_dir())
    return folder


def lineages(workspace) -> dict[str, dict[str, str]]:
    """The tags of every training of the workspace's name in MLflow, by lineage."""
    client = MlflowClient(workspace.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("vrt").experiment_id
    return {run.data.tags["vrt.lineage"]: run.data.tags for run in client.search_runs([experiment], f"tags.`vrt.name` = '{workspace.name}'")}


def metric_points(workspace) -> dict[str, list[tuple[int, float]]]:
    """Every point MLflow has, as logged: duplicates show."""
    client = MlflowClient(workspace.environment["MLFLOW_TRACKING_URI"])
    lineage = lineage_folder(workspace).name
    experiment = client.get_experiment_by_name("vrt")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`vrt.lineage` = '{lineage}'")
    return {key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)] for key in DETERMINISTIC}


def assert_same_bits(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same_bits(a, b)
    else:
        assert one == other


def assert_same_files(one, other) -> None:
    """The last checkpoints of two workspaces are bit-identical, their history of metrics with them."""
    for name in ("24_G.pth", "24_E.pth", "24_optimizerG.pth"):
        first, second = (torch.load(lineage_folder(workspace) / name, weights_only=True) for workspace in (one, other))
        assert_same_bits(first, second)
    histories = [(lineage_folder(workspace) / "24_history.jsonl").read_bytes() for workspace in (one, other)]
    assert histories[0] == histories[1]


def assert_same_training(one, other) -> None:
    """The last checkpoints of two workspaces, and what MLflow shows of their metrics, are bit-identical."""
    assert_same_files(one, other)
    assert metric_points(one) == metric_points(other)
    assert [step for step, _ in metric_points(one)["train/loss"]] == list(range(1, 25))
