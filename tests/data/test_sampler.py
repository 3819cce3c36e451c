"""Samples are a function of (seed, step, index), complete, evenly spread, and degraded consistently."""

import dataclasses
import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vrt.data.clips import Clip, DataError, PreparedData
from vrt.data.degradations import bicubic_downsample, blur_downsample
from vrt.data.evaluated import EvaluatedClip
from vrt.data.sampler import Batch, check_sampling, training_batch, training_sample

SMALL = {"train.crop": 16, "train.frames": 4, "train.batch_size": 2}
BICUBIC = {"degradation": {"kind": "bicubic", "scale": 4}, "network.upscale": 4, **SMALL}
BLUR_DOWN = {**BICUBIC, "degradation": {"kind": "blur_down", "scale": 4, "sigma": 1.6}}
RECORDED = {**SMALL, "degradation": {"kind": "recorded"}}
BETWEEN = {
    **SMALL,
    "degradation": {"kind": "between"},
    **{"network.pa_frames": 0, "network.deformable_groups": 0, "network.img_size": [4, 48, 48], "evaluate.overlap": [0, 16, 16]},
}


Reduction = Callable[[torch.Tensor], torch.Tensor]


def same(one: Batch, two: Batch) -> bool:
    return torch.equal(one.degraded, two.degraded) and torch.equal(one.truth, two.truth)


def noise(sigma_min: float, sigma_max: float, sigma_test: float = 30.0) -> dict[str, float]:
    return {f"degradation.{key}": value for key, value in locals().items()}


def test_a_batch_has_the_shapes_and_range_of_the_params(coordinates: PreparedData, make_params):
    batch = training_batch(coordinates, make_params(SMALL), 1)
    assert batch.truth.shape == batch.degraded.shape == (2, 4, 3, 16, 16)
    assert batch.truth.dtype == batch.degraded.dtype == torch.float32
    assert batch.truth.min() >= 0 and batch.truth.max() <= 1
    assert batch.truth.is_contiguous() and batch.degraded.is_contiguous()


def test_truth_is_stored_pixels_over_255(coordinates: PreparedData, make_params):
    grey = training_batch(coordinates, make_params(SMALL), 1).truth * 255
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-4)


def test_a_batch_is_a_function_of_seed_and_step(coordinates: PreparedData, make_params):
    params, reseeded = make_params(SMALL), make_params({**SMALL, "seed": 2})
    forwards = [training_batch(coordinates, params, step) for step in (1, 2, 3)]
    backwards = [training_batch(coordinates, params, step) for step in (3, 2, 1)][::-1]
    assert all(map(same, forwards, backwards))
    others = [training_batch(coordinates, reseeded, step) for step in (1, 2, 3)]
    assert not any(same(one, two) for one, two in itertools.combinations(forwards + others, 2))


def test_the_samples_of_a_batch_differ(coordinates: PreparedData, make_params):
    batch = training_batch(coordinates, make_params({**SMALL, "train.batch_size": 4}), 1)
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(batch.degraded - batch.truth, 2))


def test_a_sample_does_not_depend_on_the_rest_of_its_batch(coordinates: PreparedData, make_params):
    two, five = (training_batch(coordinates, make_params({**SMALL, "train.batch_size": size}), 9) for size in (2, 5))
    assert torch.equal(five.degraded[:2], two.degraded)
    degraded, truth = training_sample(coordinates, make_params(SMALL), 9, 4)
    assert torch.equal(degraded, five.degraded[4]) and torch.equal(truth, five.truth[4])


def test_samples_are_those_that_the_first_trainings_saw(coordinates: PreparedData, make_params):
    # A resumed training under newer code must see the very same: this is what the code drew before clips were packed, noise included.
    digest = hashlib.sha256()
    for step in (1, 2, 1000):
        batch = training_batch(coordinates, make_params(SMALL), step)
        digest.update(batch.degraded.numpy().tobytes() + batch.truth.numpy().tobytes())
    assert digest.hexdigest() == "572035fb8f6517aca7cb07b2d6865e9b097a37d160038ec52e23e9f57a119bba"


def evaluation_clip(data: PreparedData, params, clip: Clip) -> Batch:
    """A whole clip as it is evaluated."""
    evaluated = EvaluatedClip(data, params, clip)
    return Batch(*(frames[None] for frames in evaluated.read(0, evaluated.count)))


def damage(data: PreparedData, clip: Clip) -> None:
    path = data.root / clip.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_clip_stops_the_training_or_is_skipped_as_the_params_say(coordinates: PreparedData, make_params):
    sound = [training_batch(coordinates, make_params(SMALL), step) for step in range(1, 9)]
    a, b = coordinates.clips("train")
    # Another copy: what was read is trusted from then on.
    copied = dataclasses.replace(coordinates, root=shutil.copytree(coordinates.root, coordinates.root.with_name("copied")))
    damage(copied, a)
    skipping = [training_batch(copied, make_params({**SMALL, "data.damaged": "skip"}), step) for step in range(1, 9)]
    count = 0
    for step, (whole, batch) in enumerate(zip(sound, skipping), start=1):
        for index in range(2):
            mine = [reason for reason in batch.skipped if reason.startswith(f"step {step}, sample {index}, clip train/a")]
            count += len(mine)
            assert batch.truth[index].equal(whole.truth[index]) == (not mine)
            # Red is the frame; those of clip b count from 100.
            assert batch.truth[index, 0, 0].min() * 255 >= 100
    assert count > 4 and sum(len(batch.skipped) for batch in skipping) == count
    assert same(training_batch(copied, make_params({**SMALL, "data.damaged": "skip"}), 3), skipping[2])

    with pytest.raises(DataError, match=r"step \d, sample \d, clip train/a .*: expected SHA-256 .*, or set data.damaged: skip to train without it"):
        for step in range(1, 9):
            training_batch(copied, make_params(SMALL), step)
    lost = dataclasses.replace(coordinates, root=shutil.copytree(copied.root, coordinates.root.with_name("lost")))
    damage(lost, b)
    with pytest.raises(DataError, match=r"10 clips drawn one after another can't be read; the last: step 1, sample 0, clip train/[ab] "):
        training_batch(lost, make_params({**SMALL, "data.damaged": "skip"}), 1)


def test_motion_blur_is_the_mean_of_frames_around_the_sharp_one(coordinates: PreparedData, make_params):
    params = make_params({**SMALL, "train.frames": 2, "degradation": {"kind": "motion_blur", "frames": 3}})
    degraded, truth = training_sample(coordinates, params, 1, 0)
    assert degraded.shape == truth.shape == (2, 3, 16, 16)
    # Red counts frames, and nothing else moves: the mean of three is the one in the middle.
    assert torch.allclose(degraded, truth, atol=1e-6) and (truth[1, 0] - truth[0, 0]).mul(255).round().eq(3).all()
    whole = evaluation_clip(coordinates, params, coordinates.clips("test")[0])
    assert whole.degraded.shape == whole.truth.shape == (1, 2, 3, 21, 26)
    assert (whole.truth[0, :, 0, 0, 0] * 255).round().tolist() == [221, 224]
    with pytest.raises(DataError, match=r"clip train/b .*: expected at least 9 frames for train.frames = 3, found 7"):
        check_sampling(coordinates, make_params({**SMALL, "train.frames": 3, "degradation": {"kind": "motion_blur", "frames": 3}}))


def test_every_window_and_every_turn_occurs_and_pixels_stay_together(coordinates: PreparedData, make_params):
    """Red is the frame, green the row, blue the column (see `coordinate_clip`)."""
    params = make_params({**SMALL, **noise(0.0, 0.0)})
    windows, turns, corners = Counter(), Counter(), Counter()
    for step in range(400):
        degraded, truth = training_sample(coordinates, params, step, 0)
        assert torch.equal(degraded, truth)
        frame, row, column = (truth * 255).round().int().numpy().transpose(1, 0, 2, 3)
        np.testing.assert_array_equal(frame, np.broadcast_to(frame[0, 0, 0] + np.arange(4)[:, None, None], frame.shape))
        steps = [int(part[0, 1, 0] - part[0, 0, 0]) for part in (row, column)] + [int(part[0, 0, 1] - part[0, 0, 0]) for part in (row, column)]
        y, x = np.mgrid[:16, :16]
        np.testing.assert_array_equal(row, np.broadcast_to(row[0, 0, 0] + steps[0] * y + steps[2] * x, row.shape))
        np.testing.assert_array_equal(column, np.broadcast_to(column[0, 0, 0] + steps[1] * y + steps[3] * x, column.shape))
        windows[int(frame[0, 0, 0])] += 1
        turns[tuple(steps)] += 1
        corners[int(row.min()), int(column.min())] += 1
    assert sorted(windows) == [*range(6), *range(100, 104)]
    # 400 draws, 10 equally likely windows: 40 each, standard deviation 6.
    assert min(windows.values()) > 16 and max(windows.values()) < 64
    assert len(turns) == 8 and min(turns.values()) > 22
    assert {row for row, _ in corners} == set(range(15)) and {column for _, column in corners} == set(range(13))


def test_noise_levels_fill_their_range_and_noise_has_its_level(quickstart: PreparedData, make_params):
    params = make_params({**noise(10.0, 50.0), "network.nonblind_denoising": True})
    drawn = []
    for step in range(60):
        degraded, truth = training_sample(quickstart, params, step, 0)
        level = degraded[:, 3]
        assert (level == level[0, 0, 0]).all()
        drawn.append(float(level[0, 0, 0]) * 255)
        # 41,472 draws: the measured deviation's own deviation is sigma / 288.
        assert float((degraded[:, :3] - truth).std()) * 255 == pytest.approx(drawn[-1], rel=4 / 288)
    assert 10 <= min(drawn) < 14 and 46 < max(drawn) <= 50


def test_a_level_map_changes_neither_truth_nor_noise(coordinates: PreparedData, make_params):
    blind = training_batch(coordinates, make_params(SMALL), 1)
    informed = training_batch(coordinates, make_params({**SMALL, "network.nonblind_denoising": True}), 1)
    assert torch.equal(informed.truth, blind.truth) and torch.equal(informed.degraded[:, :, :3], blind.degraded)
    assert torch.equal(informed.degraded[:, :, 3], torch.full((2, 4, 16, 16), 30 / 255))


@pytest.mark.parametrize(
    "kind, reduce",
    [(BICUBIC, lambda clip: bicubic_downsample(clip, 4)), (BLUR_DOWN, lambda clip: blur_downsample(clip, 4, 1.6))],
    ids=["bicubic", "blur_down"],
)
def test_a_reduced_crop_is_the_crop_of_the_reduced_clip(quickstart: PreparedData, make_params, kind: dict, reduce: Reduction):
    """Borders included: the pixels around the crop take part, as they do when a whole clip is restored."""
    params = make_params({**kind, "train.crop": 48})
    for step in range(12):
        degraded, truth = training_sample(quickstart, params, step, 0)
        assert (degraded.shape, truth.shape) == ((4, 3, 12, 12), (4, 3, 48, 48))
        assert find_reduced(quickstart, truth, degraded, reduce), f"step {step}"


def find_reduced(data: PreparedData, truth: torch.Tensor, degraded: torch.Tensor, reduce: Reduction) -> bool:
    """Whether a turned training clip holds `truth` (D, 3, H, W) at a place where its reduction, rounded to 8 bits, holds `degraded`."""
    for clip in data.clips("train"):
        pixels = torch.from_numpy(data.read_whole(clip)).permute(0, 3, 1, 2) / 255
        for transpose, across, down in itertools.product((False, True), repeat=3):
            turned = pixels.transpose(-1, -2) if transpose else pixels
            turned = turned.flip([-1] * across + [-2] * down) if across or down else turned
            places = turned.unfold(-2, 48, 4).unfold(-2, 48, 4)  # (D, 3, rows, columns, 48, 48)
            hits = (places[..., 0, :2] == truth[0, :, None, None, 0, :2]).all(dim=-1).all(dim=1).nonzero()
            for first, row, column in hits.tolist():
                if torch.equal(turned[first : first + 4, :, 4 * row : 4 * row + 48, 4 * column : 4 * column + 48], truth):
                    reduced = (reduce(turned[first : first + 4]) * 255).round().clamp(0, 255)
                    found = reduced[..., row : row + 12, column : column + 12]
                    return torch.allclose(found / 255, degraded, rtol=0, atol=1e-6)
    return False


def test_every_crop_of_a_reduction_is_reachable_up_to_the_borders(coordinates: PreparedData, make_params):
    params = make_params(BICUBIC)
    corners = set()
    for step in range(200):
        _, truth = training_sample(coordinates, params, step, 0)
        _, row, column = (truth * 255).round().int().numpy().transpose(1, 0, 2, 3)
        corners.add((int(row.min()), int(column.min())))
    # Clip a is 24x28; clip b 30x20, of which 28x20 divide by 4.
    assert corners == {(y, x) for y in (0, 4, 8) for x in (0, 4, 8, 12)} | {(y, x) for y in (0, 4, 8, 12) for x in (0, 4)}


def levels(clip: torch.Tensor) -> np.ndarray:
    """(..., C, H, W) in [0, 1] -> whole grey levels."""
    return (clip * 255).round().int().numpy()


def test_recorded_frames_come_from_the_same_place_as_the_sharp_ones(negatives: PreparedData, make_params):
    params = make_params(RECORDED)
    for step in range(20):
        degraded, truth = training_sample(negatives, params, step, 0)
        assert degraded.shape == truth.shape == (4, 3, 16, 16)
        np.testing.assert_array_equal(levels(degraded), 255 - levels(truth))
    assert len({float(training_sample(negatives, params, step, 0)[1].sum()) for step in range(20)}) > 10
    clip = negatives.clips("test")[0]
    batch = evaluation_clip(negatives, params, clip)
    np.testing.assert_array_equal(levels(batch.truth[0]), negatives.read_whole(clip).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(levels(batch.degraded), 255 - levels(batch.truth))


def test_an_interpolation_gets_every_second_frame_and_makes_the_middle_one(coordinates: PreparedData, make_params):
    params = make_params(BETWEEN)
    firsts = set()
    for step in range(40):
        degraded, truth = training_sample(coordinates, params, step, 0)
        assert (degraded.shape, truth.shape) == ((4, 3, 16, 16), (1, 3, 16, 16))
        given, made = levels(degraded)[:, 0, 0, 0], levels(truth)[:, 0, 0, 0]
        np.testing.assert_array_equal(given - given[0], [0, 2, 4, 6])
        assert made - given[0] == [3]
        np.testing.assert_array_equal(levels(degraded)[:, 1:], np.broadcast_to(levels(truth)[:, 1:], (4, 2, 16, 16)))
        firsts.add(int(given[0]))
    assert firsts == {0, 1, 2, 100}


def test_an_interpolated_evaluation_clip_makes_every_frame_that_has_enough_neighbours(tmp_path, coordinate_clip, write_data, make_params):
    data = write_data(tmp_path / "data", {"test/a": coordinate_clip(12, 8, 8), "test/b": coordinate_clip(7, 8, 8)})
    for clip, given, made in zip(data.clips("test"), ([0, 2, 4, 6, 8, 10], [0, 2, 4, 6]), ([3, 5, 7], [3])):
        batch = evaluation_clip(data, make_params(BETWEEN), clip)
        assert levels(batch.degraded)[0, :, 0, 0, 0].tolist() == given
        assert levels(batch.truth)[0, :, 0, 0, 0].tolist() == made


def test_mirrored_frames_continue_the_window_backwards(coordinates: PreparedData, make_params):
    params = make_params({**SMALL, **noise(30.0, 30.0), "train.frames": 9, "train.mirrored_frames": 2})
    for step in range(10):
        degraded, truth = training_sample(coordinates, params, step, 0)
        assert degraded.shape == truth.shape == (9, 3, 16, 16)
        frames = levels(truth)[:, 0, 0, 0]
        assert (frames - frames[0]).tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 5]
        assert torch.equal(degraded[7:], degraded[[6, 5]])


def test_an_evaluation_clip_is_whole_and_always_degraded_alike(coordinates: PreparedData, make_params):
    clip = coordinates.clips("test")[0]
    batch = evaluation_clip(coordinates, make_params(noise(0.0, 5.0)), clip)
    assert torch.equal((batch.truth[0] * 255).round().byte(), torch.from_numpy(coordinates.read_whole(clip)).permute(0, 3, 1, 2))
    assert float((batch.degraded - batch.truth).std()) * 255 == pytest.approx(30, rel=0.03)
    assert same(batch, evaluation_clip(coordinates, make_params({**noise(0.0, 9.0), "seed": 5, **SMALL}), clip))


def test_evaluation_clips_differ_in_their_noise(tmp_path, coordinate_clip, write_data, make_params):
    clip = coordinate_clip(2, 8, 8)
    data = write_data(tmp_path / "data", {"val/a": clip, "test/a": clip, "test/b": clip})
    batches = [evaluation_clip(data, make_params(), clip) for clip in data.index.clips]
    assert not any(same(one, two) for one, two in itertools.combinations(batches, 2))


@pytest.mark.parametrize("kind", [BICUBIC, BLUR_DOWN], ids=["bicubic", "blur_down"])
def test_an_evaluation_clip_is_cut_to_a_multiple_of_the_scale(coordinates: PreparedData, make_params, kind: dict):
    clip = coordinates.clips("test")[0]
    batch = evaluation_clip(coordinates, make_params(kind), clip)
    assert (batch.truth.shape, batch.degraded.shape) == ((1, 8, 3, 20, 24), (1, 8, 3, 5, 6))
    assert batch.degraded.min() >= 0 and batch.degraded.max() <= 1
    grey = batch.degraded * 255
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.frames": 8}, r"clip train/b \(7 frames of 30x20\): expected at least train.frames = 8 frames, found 7; lower train.frames"),
        (
            {"train.crop": 22},
            r"clip train/b \(7 frames of 30x20\): expected frames of at least train.crop = 22 pixels, found 30x20; lower train.crop",
        ),
        (
            {"train.frames": 9, "train.mirrored_frames": 1},
            r"clip train/b \(7 frames of 30x20\): expected at least 8 frames for train.frames = 9, found 7; lower train.frames",
        ),
        (BETWEEN, r"clip val/a \(6 frames of 20x24\): expected at least 7 frames for train.frames = 4, found 6; .* or use longer clips"),
        (
            RECORDED,
            r"clip train/a .*: expected degraded frames recorded beside it, found none; import pairs of folders with `vrt data import --layout`",
        ),
        ({"train.crop": 26}, r"clip train/a \(9 frames of 24x28\): expected frames of at least train.crop = 26 pixels, found 24x28"),
    ],
)
def test_clips_too_small_are_refused_before_the_first_batch(coordinates: PreparedData, make_params, changes: dict, message: str):
    with pytest.raises(DataError, match=message):
        check_sampling(coordinates, make_params({**SMALL, **changes}))


def test_a_split_without_clips_is_refused(tmp_path, coordinate_clip, write_data, make_params):
    data = write_data(tmp_path / "data", {"train/a": coordinate_clip(6, 48, 48), "val/a": coordinate_clip(6, 48, 48)})
    with pytest.raises(DataError, match=r"data: expected clips in the split test, found none; add some to data/raw/made-by-test/dataset.yaml"):
        check_sampling(data, make_params())
