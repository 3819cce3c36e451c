"""Small data sets and params for the tests of vrt.data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vrt.data.clips import PreparedData
from vrt.data.prepare import prepare
from vrt.data.writing import writing
from vrt.params import Params
from vrt.typed_yaml import parse, read_yaml

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "data" / "raw" / "quickstart"


@pytest.fixture
def make_params() -> Callable[..., Params]:
    """The quickstart's params with some keys changed: make_params({"train.crop": 32})."""

    def make(changes: dict[str, object] | None = None) -> Params:
        tree = read_yaml(REPOSITORY / "recipes" / "quickstart.yaml")
        for key, value in (changes or {}).items():
            *sections, last = key.split(".")
            section = tree
            for part in sections:
                section = section[part]
            section[last] = value
        crop = tree["train"].pop("crop")
        params = parse(Params, tree | {"train": tree["train"] | {"crop": 64}}, Path("test params"))
        # The network wants crops in larger units than the sampler, which these tests are about and which small clips serve better.
        return params.model_copy(update={"train": params.train.model_copy(update={"crop": crop})})

    return make


@pytest.fixture
def coordinate_clip() -> Callable[..., np.ndarray]:
    """Makes uint8 (D, H, W, 3) whose pixels say where they are: red the frame (from `first`), green the row, blue the column."""

    def make(frames: int, height: int, width: int, first: int = 0) -> np.ndarray:
        t, y, x = np.mgrid[first : first + frames, :height, :width]
        return np.stack([t, y, x], axis=-1).astype(np.uint8)

    return make


@pytest.fixture
def write_data() -> Callable[[Path, dict[str, np.ndarray]], PreparedData]:
    """Makes a prepared data set of {"train/a": uint8 (D, H, W, 3), ...}; `recorded` makes the degraded frames of each."""

    def write(root: Path, clips: dict[str, np.ndarray], recorded: Callable[[np.ndarray], np.ndarray] | None = None) -> PreparedData:
        with writing(root, "made-by-test") as writer:
            for name, pixels in clips.items():
                writer.add(*name.split("/"), len(pixels), pixels, recorded(pixels) if recorded else None)
        return PreparedData.open(root)

    return write


@pytest.fixture
def coordinate_clips(coordinate_clip) -> dict[str, np.ndarray]:
    """Two training clips of different size, one validation and one test clip, all made by `coordinate_clip`."""
    return {
        "train/a": coordinate_clip(9, 24, 28),
        "train/b": coordinate_clip(7, 30, 20, first=100),
        "val/a": coordinate_clip(6, 20, 24, first=200),
        "test/a": coordinate_clip(8, 21, 26, first=220),
    }


@pytest.fixture
def coordinates(tmp_path: Path, coordinate_clips, write_data) -> PreparedData:
    """`coordinate_clips`, prepared."""
    return write_data(tmp_path / "coordinates", coordinate_clips)


@pytest.fixture
def negatives(tmp_path: Path, coordinate_clips, write_data) -> PreparedData:
    """`coordinate_clips`, each with its negative recorded beside it."""
    return write_data(tmp_path / "negatives", coordinate_clips, recorded=lambda pixels: 255 - pixels)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The data set of the quickstart, prepared once. Not to be changed by a test."""
    return prepare(QUICKSTART, tmp_path_factory.mktemp("quickstart") / "prepared")
