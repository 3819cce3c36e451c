"""Small files that `dvc metrics show` and `dvc plots show` read."""

import json
import os
from pathlib import Path

from vrt.training.history import History


def write_training_report(folder: Path, history: History) -> None:
    """training.json (where the training stands), loss.csv and validation.csv (its curves)."""
    newest = history.newest()
    rows = history.rows
    summary = {
        "step": rows[-1]["step"] if rows else 0,
        "train_loss": round(newest["train/loss"], 5),
        "val_psnr": round(newest["val/psnr"], 3),
        "val_ssim": round(newest["val/ssim"], 4),
    }
    write_text(folder / "training.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "loss.csv", history.to_csv(["train/loss", "train/lr"]))
    write_text(folder / "validation.csv", history.to_csv(["val/psnr", "val/ssim"]))


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
