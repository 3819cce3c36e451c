"""A clip is evaluated the same however much of it is read at once."""

import hashlib

import numpy as np
import pytest
import torch

from vrt.data.clips import PreparedData
from vrt.data.degradations import add_noise
from vrt.data.errors import DataError
from vrt.data.evaluated import EvaluatedClip

FOUR = {"network.pa_frames": 0, "network.deformable_groups": 0, "network.img_size": [4, 48, 48], "evaluate.overlap": [0, 16, 16], "train.frames": 4}
KINDS = {
    "noise": {},
    "non-blind noise": {"network.nonblind_denoising": True},
    "bicubic": {"degradation": {"kind": "bicubic", "scale": 4}, "network.upscale": 4},
    "blur_down": {"degradation": {"kind": "blur_down", "scale": 4, "sigma": 1.6}, "network.upscale": 4},
    "motion_blur": {"degradation": {"kind": "motion_blur", "frames": 3}},
    "recorded": {"degradation": {"kind": "recorded"}},
    "between": {"degradation": {"kind": "between"}, **FOUR},
}


@pytest.fixture
def long(tmp_path, coordinate_clip, write_data) -> PreparedData:
    return write_data(tmp_path / "long", {"test/a": coordinate_clip(21, 20, 24)}, recorded=lambda pixels: 255 - pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_overlap_are_those_of_the_whole(kind: str, long: PreparedData, make_params):
    params, clip = make_params(KINDS[kind]), long.clips("test")[0]
    whole, pieces = EvaluatedClip(long, params, clip), EvaluatedClip(long, params, clip)
    degraded, truth = whole.read(0, whole.count)
    assert len(truth) == whole.count == {"motion_blur": 7, "between": 8}.get(kind, 21)
    more = len(degraded) - len(truth)
    assert more == (3 if kind == "between" else 0)
    for start, stop in [(0, 3), (2, 5), (4, 7), (6, 7)]:
        some_degraded, some_truth = pieces.read(start, stop)
        assert torch.equal(some_degraded, degraded[start : stop + more]) and torch.equal(some_truth, truth[start:stop])


def test_the_noise_is_what_it_was_when_the_first_results_were_published(long: PreparedData, make_params, coordinate_clip):
    rng = np.random.default_rng(list(hashlib.sha256(b"test/a.npy").digest()))
    truth = torch.from_numpy(coordinate_clip(21, 20, 24)).permute(0, 3, 1, 2).float() / 255
    degraded, _ = EvaluatedClip(long, make_params(), long.clips("test")[0]).read(0, 21)
    assert torch.equal(degraded, add_noise(truth, 30, rng))


def test_a_clip_too_short_is_named(tmp_path, coordinate_clip, write_data, make_params):
    data = write_data(tmp_path / "short", {"test/a": coordinate_clip(6, 20, 24), "test/b": coordinate_clip(2, 20, 24)})
    first, second = data.clips("test")
    with pytest.raises(DataError, match=r"clip test/a \(6 frames of 20x24\): expected at least 7 frames to make one of, found 6; use longer clips"):
        EvaluatedClip(data, make_params(KINDS["between"]), first)
    with pytest.raises(DataError, match=r"clip test/b .*: expected at least 3 frames to make one of, found 2"):
        EvaluatedClip(data, make_params(KINDS["motion_blur"]), second)
