"""Homes to start, break and stop services in; whatever a test leaves running ends with it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vrt import services


@pytest.fixture
def s3_home(tmp_path: Path, make_home: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home that runs S3 only, up in a moment: MLflow and Prefect are given by the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///given.db")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    home = make_home(tmp_path / ".vrt")
    yield home
    services.down(home)


@pytest.fixture(scope="module")
def full_home(tmp_path_factory: pytest.TempPathFactory, make_home: Callable[[Path], Path]) -> Iterator[Path]:
    """A home for all three, shared by the tests of a module: each calls `up` first and may leave any wreck behind."""
    home = make_home(tmp_path_factory.mktemp("full") / ".vrt")
    yield home
    services.down(home)
