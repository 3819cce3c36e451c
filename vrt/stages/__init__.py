"""The stages of dvc.yaml, put together from the packages below them."""

from pathlib import Path

PREPARED = Path("data/prepared")
CHECKPOINTS = Path("checkpoints")
MODEL = Path("model")
REPORTS = Path("reports")
