"""Small files that `dvc metrics show` and `dvc plots show` read."""

import io
import json
from pathlib import Path

from vrt.evaluation.report import write_file
from vrt.training.history import History

DIGITS = {"train/loss": 5, "val/psnr": 3, "val/ssim": 4}
"""What a report says, and how exactly."""


def write_training_report(folder: Path, history: History) -> None:
    """training.json (where the training stands), loss.csv and validation.csv (its curves), and curves.png: DVC's own need the internet."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = history.newest()
    rows = history.rows
    # A checkpoint that was adopted and has nothing left to train brings no loss along.
    known = {key: digits for key, digits in DIGITS.items() if key in newest}
    summary = {"step": rows[-1]["step"] if rows else 0} | {key.replace("/", "_"): round(newest[key], digits) for key, digits in known.items()}
    write_file(folder / "training.json", json.dumps(summary, indent=1).encode() + b"\n")
    write_file(folder / "loss.csv", history.to_csv(["train/loss", "train/lr"]).encode())
    write_file(folder / "validation.csv", history.to_csv(["val/psnr", "val/ssim"]).encode())
    write_file(folder / "curves.png", curves(history))


def curves(history: History) -> bytes:
    """The loss, and the validation PSNR, by step, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    plots = {"Charbonnier loss": ("train/loss", "-"), "validation PSNR (dB)": ("val/psnr", "o-")}
    for axes, (label, (key, style)) in zip(figure.subplots(1, 2), plots.items()):
        points = [(row["step"], row[key]) for row in history.rows if key in row]
        if points:
            axes.plot(*zip(*points), style, linewidth=1.2, markersize=4)
        axes.set_xlabel("step")
        axes.set_title(label)
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    # Without the version of the library, which would make the same curves another file.
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
