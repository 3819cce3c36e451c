"""The description of a training's run in MLflow: what it trains, on what, what there is of it, and how to go on."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from vrt.checkpoint.tracking import LONGEST_DESCRIPTION, Lineage
from vrt.params import Params, load_params
from vrt.stages import PREPARED
from vrt.stages.recipes import RECIPES
from vrt.typed_yaml import ParamsError, read_yaml

TASKS = {
    "noise": "remove noise",
    "bicubic": "enlarge frames that were reduced bicubically",
    "blur_down": "enlarge frames that were blurred and reduced",
    "motion_blur": "undo the blur of a shutter that stayed open",
    "recorded": "restore frames that a camera recorded",
    "between": "make the frames in between",
}
NOT_RECORDED = "not recorded"


def run_page(params: Params, lineage: Lineage, about: Mapping[str, str], entries: Sequence[Mapping[str, str]]) -> str:
    """In markdown, short enough for MLflow: older checkpoints are left out of the table where it gets too long. `entries` come newest first."""
    newest = entries[0]["step"] if entries else None
    upscale = f", x{params.network.upscale}" if params.network.upscale > 1 else ""
    lines = [
        f"A VRT that learns to **{TASKS[params.degradation.kind]}**{upscale}, on the data set **{params.data.dataset}** "
        f"(digest `{about['data_version'][:12]}`, DVC `{about['dvc_data']}`), by the recipe **{about['recipe']}**: "
        f"{params.train.total_steps:,} steps of {params.train.batch_size} clips of {params.train.frames} frames, "
        f"{params.train.crop} x {params.train.crop} pixels.",
        "",
        "Go on with it, on any machine with this MLflow and S3, its data and its `params.yaml`:",
        "```",
        "dvc repro          # or: vrt train, or: prefect deployment run train/vrt",
        "```",
    ]
    if newest:
        lines += [
            "Use it, or branch off it:",
            "```",
            f"vrt restore INPUT -o OUTPUT --checkpoint {lineage.id}@{newest}",
            f'vrt train --resume "fork {lineage.id}@{newest}"',
            f"vrt checkpoints show {newest} --lineage {lineage.id}",
            "```",
        ]
    head = ["", "| step | PSNR | SSIM | loss | size | attempt | version | digest |", "|---|---|---|---|---|---|---|---|"]
    rows = [_row(lineage, entry) for entry in entries]
    remark = "", f"Older ones are versions of [{lineage.model}](#/models/{lineage.model})."
    kept = len(rows)
    while kept and len("\n".join([*lines, *head, *rows[:kept], *remark])) > LONGEST_DESCRIPTION:
        kept -= 1
    return "\n".join([*lines, *head, *rows[:kept], *(remark if kept < len(rows) else [])])


def _row(lineage: Lineage, entry: Mapping[str, str]) -> str:
    version = f"[{entry['version']}](#/models/{lineage.model}/versions/{entry['version']})"
    measured = [entry.get(key, "") for key in ("val_psnr", "val_ssim", "train_loss")]
    size = f"{int(entry['bytes']) / 1e6:.1f} MB"
    cells = [entry["step"], *measured, size, entry.get("attempt", ""), version, f"`{entry['digest'][:12]}`"]
    return f"| {' | '.join(cells)} |"


def about_checkpoints(params: Params, lineage: Lineage) -> dict[str, str]:
    """What to say of every checkpoint beside its own numbers: the recipe, and the versions of the data."""
    return {"recipe": recipe_of(params), "data_version": str(lineage.identity["data.digest"]), "dvc_data": dvc_version(Path("dvc.lock"), PREPARED)}


def recipe_of(params: Params) -> str:
    """The recipe that trains the same network on the same data in the same way; "own" where there is none."""
    return next((name for name, identity in _recipes().items() if identity == params.identity()), "own")


@cache
def _recipes() -> dict[str, Mapping]:
    return {path.stem: load_params(path).identity() for path in sorted(RECIPES.glob("*.yaml"))}


def dvc_version(lock: Path, output: Path) -> str:
    """The MD5 by which DVC knows an output of the last `dvc repro`."""
    try:
        stages = read_yaml(lock)["stages"].values()
        return next(out["md5"] for stage in stages for out in stage.get("outs", []) if out["path"] == output.as_posix())
    except (OSError, ParamsError, TypeError, KeyError, AttributeError, StopIteration):
        # Without DVC, or before its first run, there is none: the digest above names the data all the same.
        return NOT_RECORDED
