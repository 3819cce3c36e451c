"""An evaluation as files that DVC shows and as a table for the terminal."""

import csv
import io
import json
import os
from pathlib import Path

from rich.table import Table

from vrt.evaluation.measuring import ClipResult, Scores
from vrt.evaluation.pictures import comparison, png
from vrt.evaluation.run import Evaluation

# Finer than any difference that means something, and coarse enough for a diff that can be read.
DECIMALS = 4


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write the report into `folder`, which is made if need be. Each file appears whole or not at all.

    metrics.json     the means, flat, for `dvc metrics show`
    clips.csv        one row per clip, for `dvc plots`
    table.md         PSNR/SSIM per clip, as papers print them
    comparison.png   the worst square of every clip, or of the `CLIPS_SHOWN` restored worst: input, restored, truth
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "metrics.json", json.dumps(_rounded(evaluation.means), indent=2, allow_nan=False).encode() + b"\n")
    write_file(folder / "clips.csv", _clips_csv(evaluation).encode())
    write_file(folder / "table.md", published_table(evaluation).encode())
    worst = comparison([(_title(row), row.worst_crops) for row in evaluation.rows if row.worst_crops])
    write_file(folder / "comparison.png", png(worst))


def summary_table(evaluation: Evaluation) -> Table:
    """One row per clip and one for the mean, PSNR and SSIM on RGB, with the `verdict` below. Fits a terminal of 80 columns."""
    table = Table(title=f"Evaluation of split {evaluation.split}", caption=verdict(evaluation), caption_justify="left")
    table.add_column("clip")
    for heading in ("frames", "input dB", "restored dB", "gain dB", "input SSIM", "restored SSIM"):
        table.add_column(heading, justify="right")
    for row in evaluation.rows:
        table.add_row(row.name, str(row.frames), *_cells(row.scores), end_section=row is evaluation.rows[-1])
    table.add_row("mean", str(sum(row.frames for row in evaluation.rows)), *_cells(evaluation.means), style="bold")
    return table


def published_table(evaluation: Evaluation) -> str:
    """Markdown, PSNR/SSIM as papers print them: per clip and mean, on RGB and on Y, which results on Vimeo-90K, Vid4 and UDM10 are compared on."""
    columns = ("clip", "frames", "input", "restored", "input (Y)", "restored (Y)")
    frames = sum(row.frames for row in evaluation.rows)
    rows = [(row.name, row.frames, row.scores) for row in evaluation.rows] + [("**mean**", frames, evaluation.means)]
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *((name, str(count), *_pairs(scores)) for name, count, scores in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def clip_records(evaluation: Evaluation) -> list[dict[str, str | int | float]]:
    """One flat record per clip: its name, frames measured and all scores."""
    return [_record(row) for row in evaluation.rows]


def _pairs(scores: Scores) -> list[str]:
    of_colours = [f"{found.psnr:.2f}/{found.ssim:.4f}" for found in (scores.input, scores.restored)]
    return of_colours + [f"{found.psnr_y:.2f}/{found.ssim_y:.4f}" for found in (scores.input, scores.restored)]


def verdict(evaluation: Evaluation) -> str:
    """One sentence: by how much the network improves on its input, or that it is worse."""
    gain, before, after = evaluation.means.gain_db, evaluation.means.input.psnr, evaluation.means.restored.psnr
    change = f"the {evaluation.input_label} ({before:.2f} -> {after:.2f} dB)"
    if gain < 0:
        return f"the network is worse than its input: restored clips lose {-gain:.2f} dB PSNR against {change}"
    return f"restored clips gain {gain:.2f} dB PSNR over {change}"


def _cells(scores: Scores) -> list[str]:
    before, after = scores.input, scores.restored
    return [f"{before.psnr:.2f}", f"{after.psnr:.2f}", f"{scores.gain_db:+.2f}", f"{before.ssim:.4f}", f"{after.ssim:.4f}"]


def _clips_csv(evaluation: Evaluation) -> str:
    records = clip_records(evaluation)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(row: ClipResult) -> dict[str, str | int | float]:
    return {"clip": row.name, "frames": row.frames} | _rounded(row.scores)


def _rounded(scores: Scores) -> dict[str, float]:
    return {name: round(value, DECIMALS) for name, value in scores.metrics().items()}


def _title(row: ClipResult) -> str:
    return f"{row.name}  frame {row.worst.frame}, x {row.worst.left}, y {row.worst.top}"


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: who reads `path` finds the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
