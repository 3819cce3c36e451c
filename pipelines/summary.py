"""The page that ends a training's flow run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.attempts import Attempt, table

SCORES = Path("reports/evaluation/metrics.json")


def closing_page(folder: Path, attempts: Sequence[Attempt], checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """In markdown: what was gained, what each attempt lost and how soon it went on, and the checkpoints there are."""
    scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    # One that only fetched what was trained says nothing.
    status = next((attempt.status for attempt in reversed(attempts) if attempt.status), None)
    linked = f"[{status.lineage}]({status.page})" if status else "Nothing was left to train: the model is that of an earlier run."
    measured = ["| test clips | input | restored |", "|---|---|---|"]
    for name in ("psnr", "ssim"):
        measured.append(f"| {name.upper()} | {scores[f'input_{name}']:.3f} | {scores[name]:.3f} |")
    kept = ["| step | validation PSNR | size | registered |", "|---|---|---|---|"]
    for row in checkpoints:
        psnr = f"{row['val_psnr']:.2f} dB" if row["val_psnr"] is not None else ""
        size = f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] is not None else "?"
        kept.append(f"| {row['step']} | {psnr} | {size} | {'yes' if row['registered'] else 'NO'} |")
    return "\n".join([linked, "", *measured, "", "## Attempts", table(attempts), "", "## Checkpoints", *kept])
