"""Simulated motion: it moves, it stays within its region, and it is a function of its settings."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vrt.data.clips import SPLITS, DataError, PreparedData
from vrt.data.dataset import Synthetic, load_dataset
from vrt.data.synthetic import cut_regions, load_photographs, render_clip

QUICKSTART = Path(__file__).parents[2] / "data" / "raw" / "quickstart"
SPLIT_COLOURS = {"train": (0, 200), "val": (1, 200), "test": (2, 200)}


@pytest.fixture(scope="module")
def dataset() -> Synthetic:
    return load_dataset(QUICKSTART)


def changed(dataset: Synthetic, **changes: dict) -> Synthetic:
    tree = dataset.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return Synthetic.model_validate(tree)


def test_no_pixel_of_another_split_is_ever_seen(dataset: Synthetic):
    """Every region painted in its split's own colour, all around it in another: clips must be of that colour alone."""
    painted = {name: np.full_like(photograph, 255) for name, photograph in load_photographs().items()}
    for split, (channel, level) in SPLIT_COLOURS.items():
        for name, (top, left, height, width) in getattr(dataset.splits, split).regions.items():
            painted[name][top : top + height, left : left + width] = np.eye(3, dtype=np.uint8)[channel] * level
    for split, (channel, level) in SPLIT_COLOURS.items():
        regions = cut_regions(dataset, split, painted)
        for number, _ in enumerate(regions):
            for frame in render_clip(dataset, split, number, regions):
                assert (frame == np.eye(3, dtype=np.uint8)[channel] * level).all(), f"{split} clip {number}"


def test_sampling_never_runs_over_the_edge_of_a_region(dataset: Synthetic):
    """Beyond the edge bicubic sampling would repeat the outermost pixels: painted white, they must not show in a black region."""
    rimmed = []
    for region in cut_regions(dataset, "test", load_photographs()):
        rim = torch.full_like(region, 255)
        rim[..., 1:-1, 1:-1] = 0
        rimmed.append(rim)
    for number in range(dataset.splits.test.clips):
        for frame in render_clip(dataset, "test", number, rimmed):
            assert not frame.any()


def test_a_clip_is_a_function_of_settings_and_number(dataset: Synthetic):
    regions = cut_regions(dataset, "val", load_photographs())
    first, again, other = (np.stack(list(render_clip(dataset, "val", number, regions))) for number in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    reseeded = np.stack(list(render_clip(dataset.model_copy(update={"seed": 1}), "val", 0, regions)))
    assert (first != reseeded).any() and (first != other).any()


def test_without_motion_a_clip_stands_still(dataset: Synthetic):
    still = changed(dataset, motion={"pan": 0.0, "zoom": 0.0, "rotation": 0.0, "shake": 0.0}, foreground={"speed": 0.0})
    frames = np.stack(list(render_clip(still, "val", 0, cut_regions(still, "val", load_photographs()))))
    assert (frames == frames[0]).all()


def test_a_pan_moves_the_picture_by_what_was_asked(dataset: Synthetic):
    """On a slope of one grey level per pixel, the step from frame to frame is the pan along it: 0.4 to 1 times the most."""
    slope = torch.arange(200, dtype=torch.float64).expand(1, 3, 200, 200)
    moving = changed(dataset, motion={"pan": 3.0, "zoom": 0.0, "rotation": 0.0, "shake": 0.0}, foreground={"size": 0.01})
    lengths = []
    for number in range(4):
        across, down = (
            np.stack(list(render_clip(moving, "val", number, [region, region]))).astype(float) for region in (slope, slope.transpose(-1, -2))
        )
        # Mean over each frame's corner, far from the cut-out; rounding to 8 bits averages out over the clip.
        steps = [(clip[-1, :8, :8].mean() - clip[0, :8, :8].mean()) / (len(clip) - 1) for clip in (across, down)]
        lengths.append(np.hypot(*steps))
    assert all(0.4 * 3 - 0.1 < length < 3.1 for length in lengths), lengths
    assert np.ptp(lengths) > 0.1


def test_quickstart_clips_move_and_have_texture(quickstart: PreparedData):
    for split in SPLITS:
        for clip in quickstart.clips(split):
            frames = quickstart.read_whole(clip).astype(float)
            change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
            assert change.min() > 0.5, clip
            assert frames.std(axis=(1, 2)).mean() > 15, clip


def test_motion_that_needs_more_room_than_its_region_is_refused(dataset: Synthetic):
    fast = changed(dataset, motion={"pan": 30.0})
    message = r"val clip 0: found motion over \d+x\d+ pixels, expected at most the region's 297x150; enlarge the region, or lower motion"
    with pytest.raises(DataError, match=message):
        list(render_clip(fast, "val", 0, cut_regions(fast, "val", load_photographs())))


@pytest.mark.parametrize(
    "regions, message",
    [
        ({"lena.png": (0, 0, 9, 9)}, r"splits.val.regions.lena.png: found an unknown photograph; expected one of: china.jpg, flower.jpg"),
        ({"china.jpg": (330, 490, 100, 150)}, r"regions.china.jpg: found \[330, 490, 100, 150\] .*; expected a region within 427x640 pixels"),
    ],
)
def test_a_wrong_region_is_named(dataset: Synthetic, regions: dict, message: str):
    tree = dataset.model_dump()
    tree["splits"]["val"]["regions"] = regions
    with pytest.raises(DataError, match=message):
        cut_regions(Synthetic.model_validate(tree), "val", load_photographs())
