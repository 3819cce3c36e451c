"""The metrics of every logged step since the lineage began: part of the state, so that a resumed run has the whole curve.

Only values that are functions of (seed, step) belong here; speed and times do not.
"""

import csv
import io
import json
from collections.abc import Iterable

Row = dict[str, float]
VALIDATION = "val/"
"""Begins the names of what a validation measures."""


class History:
    """All metrics of a training so far, by step; part of each checkpoint, so that a training that moves keeps its curves."""

    def __init__(self, rows: Iterable[Row] = ()):
        self._rows: dict[int, Row] = {int(row["step"]): dict(row) for row in rows}

    def add(self, step: int, metrics: dict[str, float]) -> Row:
        """Add metrics of a step; returns all of the step's metrics so far."""
        row = self._rows.setdefault(step, {"step": step})
        row.update(metrics)
        return row

    def has(self, step: int, metric: str) -> bool:
        """Whether the step was logged with this metric."""
        return metric in self._rows.get(step, {})

    @property
    def rows(self) -> list[Row]:
        """In the order they were added, each with its step under "step"."""
        return list(self._rows.values())

    def newest(self) -> dict[str, float]:
        """The last value of every metric."""
        values: dict[str, float] = {}
        for row in self._rows.values():
            values |= row
        values.pop("step", None)
        return values

    def metrics_of(self, step: int) -> dict[str, float]:
        """What is to be said of a checkpoint: the last value of every metric, but of validations that of this step alone: it rates its weights."""
        own = self._rows.get(step, {})
        return {key: value for key, value in self.newest().items() if key in own or not key.startswith(VALIDATION)}

    def scores(self) -> dict[int, Row]:
        """What the validations measured, by step."""
        measured = {row["step"]: {key: value for key, value in row.items() if key.startswith(VALIDATION)} for row in self.rows}
        return {int(step): metrics for step, metrics in measured.items() if metrics}

    def to_bytes(self) -> bytes:
        """One JSON object a line; Python writes floats so that they read back to the same bits."""
        return b"".join(json.dumps(row).encode() + b"\n" for row in self._rows.values())

    @classmethod
    def from_bytes(cls, data: bytes) -> "History":
        """Undo `to_bytes`. Raises ValueError, KeyError or TypeError where that did not write `data`."""
        return cls(json.loads(line) for line in data.splitlines())

    def to_csv(self, keys: Iterable[str]) -> str:
        """The steps at which all of `keys` were logged, as a table for `dvc plots`."""
        columns = ["step", *keys]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in self._rows.values() if row.keys() >= set(columns))
        return text.getvalue()
