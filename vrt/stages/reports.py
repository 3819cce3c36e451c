"""Small files that `dvc metrics show` and `dvc plots show` read."""

import json
from pathlib import Path

from vrt.evaluation.report import write_file
from vrt.training.history import History


def write_training_report(folder: Path, history: History) -> None:
    """training.json (where the training stands), loss.csv and validation.csv (its curves)."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = history.newest()
    rows = history.rows
    summary = {
        "step": rows[-1]["step"] if rows else 0,
        "train_loss": round(newest["train/loss"], 5),
        "val_psnr": round(newest["val/psnr"], 3),
        "val_ssim": round(newest["val/ssim"], 4),
    }
    write_file(folder / "training.json", json.dumps(summary, indent=1).encode() + b"\n")
    write_file(folder / "loss.csv", history.to_csv(["train/loss", "train/lr"]).encode())
    write_file(folder / "validation.csv", history.to_csv(["val/psnr", "val/ssim"]).encode())
