"""How the benchmarks show and keep what they measured."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Rows = Sequence[Sequence[str]]
"""The first row names the columns."""


def show(tables: Mapping[str, Rows]) -> None:
    for title, (header, *rows) in tables.items():
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def write(benchmark: str, title: str, machine: dict[str, str], found: Mapping[str, Any], tables: Mapping[str, Rows]) -> Path:
    """Write benchmarks/results/BENCHMARK-MACHINE.json (`found`, every digit) and .md (`tables`); returns the latter, relative to the project."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine.get('accelerator', machine['processor'])}-{machine['cores']}-cores".lower()).strip("-")
    path = RESULTS / f"{benchmark}-{name}"
    facts = machine | {"date": datetime.now(UTC).date().isoformat()}
    RESULTS.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")
    lines = [f"# {title}", "", ", ".join(f"{key} {value}" for key, value in facts.items()) + f". By `python -m benchmarks.{benchmark}`."]
    for heading, (header, *rows) in tables.items():
        lines += ["", f"## {heading}", "", *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path.with_suffix(".md").relative_to(ROOT)
