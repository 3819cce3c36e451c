"""Evaluation of stand-in networks whose quality is known beforehand."""

import pytest
import torch
import torch.nn.functional as F

import vrt.evaluation.run
from vrt.evaluation.metrics import PERFECT_DB, psnr, ssim_y
from vrt.evaluation.run import evaluate, validate
from vrt.evaluation.tiling import Size
from vrt.lifecycle import ToldToStop
from vrt.params import Evaluate, Params


def with_tile(params: Params, tile: Size, overlap: Size = (0, 0, 0)) -> Params:
    return params.model_copy(update={"evaluate": Evaluate(tile=tile, overlap=overlap, measured="all")})


def test_a_network_that_undoes_the_degradation_is_perfect(noisy_data, params, shift):
    evaluation = evaluate(shift(-0.1), noisy_data, params, "val")
    assert [row.name for row in evaluation.rows] == ["lake", "tree"]
    assert [row.frames for row in evaluation.rows] == [5, 5]
    for row in evaluation.rows:
        assert row.scores.restored.psnr == PERFECT_DB
        assert row.scores.input.psnr == pytest.approx(20, abs=0.2)
    assert evaluation.means.gain_db == pytest.approx(100, abs=0.2)


def test_a_network_that_does_nothing_gains_nothing(noisy_data, params, shift):
    evaluation = evaluate(shift(0.0), noisy_data, params, "val")
    assert evaluation.means.restored == evaluation.means.input
    assert evaluation.means.gain_db == 0


def test_a_network_that_harms_has_a_negative_gain(noisy_data, params, shift):
    assert evaluate(shift(0.1), noisy_data, params, "val").means.gain_db == pytest.approx(-6, abs=0.3)


def test_metrics_are_the_means_over_clips_under_flat_names(noisy_data, params, shift):
    evaluation = evaluate(shift(-0.05), noisy_data, params, "val")
    metrics = evaluation.metrics()
    measures = ["psnr", "ssim", "psnr_y", "ssim_y"]
    assert list(metrics) == [*measures, *(f"input_{name}" for name in measures), "gain_db"]
    for name in measures:
        assert metrics[name] == pytest.approx(sum(getattr(row.scores.restored, name) for row in evaluation.rows) / 2)
        assert metrics[f"input_{name}"] == pytest.approx(sum(getattr(row.scores.input, name) for row in evaluation.rows) / 2)
    assert metrics["gain_db"] == metrics["psnr"] - metrics["input_psnr"]


def test_restored_clips_are_measured_against_their_own_truth(noisy_data, params, shift):
    degraded, truth = noisy_data.splits["test"]["wall"]
    evaluation = evaluate(shift(-0.03), noisy_data, params, "test")
    assert evaluation.metrics()["psnr"] == pytest.approx(psnr(degraded - 0.03, truth).mean().item(), abs=1e-4)
    assert evaluation.metrics()["ssim_y"] == pytest.approx(ssim_y(degraded - 0.03, truth).mean().item(), abs=1e-6)


def test_the_centre_frame_alone_is_measured_where_the_params_say_so(make_data, params, shift, texture):
    truth = texture(7, 80, 100, seed=3) * 0.8
    degraded = truth.clone()
    degraded[3] += 0.1
    centre = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"measured": "centre"})})
    row = evaluate(shift(-0.05), make_data({"test": {"septuplet": (degraded, truth)}}), centre, "test").rows[0]
    assert (row.frames, row.worst.frame) == (1, 3)
    assert row.scores.input.psnr == pytest.approx(20, abs=0.2)
    assert row.scores.restored.psnr == pytest.approx(psnr(degraded[3] - 0.05, truth[3]).item(), abs=1e-9)


def test_the_input_of_super_resolution_is_its_clamped_bicubic_enlargement(make_data, params_x4, enlarge, texture):
    truth = texture(3, 64, 80, seed=5).round()
    small = truth[:, :, ::4, ::4].contiguous()
    evaluation = evaluate(enlarge(4), make_data({"test": {"city": (small, truth)}}), params_x4, "test")
    bicubic = F.interpolate(small, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    assert evaluation.means.input.psnr == pytest.approx(psnr(bicubic, truth).mean().item(), abs=1e-9)
    assert evaluation.means.restored.psnr == pytest.approx(psnr(enlarge(4)(small[None])[0], truth).mean().item(), abs=1e-9)
    assert evaluation.input_label == "bicubic input"
    torch.testing.assert_close(evaluation.preview_frames.degraded, bicubic[1])


def test_a_noise_map_is_no_part_of_the_input_picture(noisy_data, make_data, params, shift):
    degraded, truth = noisy_data.splits["test"]["wall"]
    with_map = torch.cat((degraded, torch.full_like(degraded[:, :1], 0.5)), 1)
    blind = evaluate(shift(0.0), noisy_data, params, "test")
    assert evaluate(shift(0.0), make_data({"test": {"wall": (with_map, truth)}}), params, "test").metrics() == blind.metrics()


def test_limit_takes_the_first_clips_and_validate_the_validation_split(noisy_data, params, shift):
    assert [row.name for row in evaluate(shift(0.0), noisy_data, params, "val", limit=1).rows] == ["lake"]
    assert [row.name for row in validate(shift(0.0), noisy_data, params, limit=1).rows] == ["lake"]
    assert [row.name for row in validate(shift(0.0), noisy_data, params).rows] == ["lake", "tree"]
    assert validate(shift(0.0), noisy_data, params).metrics() == evaluate(shift(0.0), noisy_data, params, "val").metrics()


def test_what_is_raised_after_a_tile_ends_it(noisy_data, params, shift):
    tiles = []

    def third() -> None:
        tiles.append(1)
        if len(tiles) == 3:
            raise ToldToStop("received SIGTERM")

    network = shift(0.0).train()
    with pytest.raises(ToldToStop):
        validate(network, noisy_data, with_tile(params, (3, 16, 16), (1, 8, 8)), after_tile=third)
    assert len(tiles) == 3 and network.training


def test_clips_larger_than_a_tile_are_tiled_and_come_out_the_same(noisy_data, params, shift):
    whole, tiled = shift(-0.05), shift(-0.05)
    a = evaluate(whole, noisy_data, with_tile(params, (5, 80, 100)), "test")
    b = evaluate(tiled, noisy_data, with_tile(params, (3, 48, 48), (1, 8, 8)), "test")
    assert len(whole.modes) == 1 and len(tiled.modes) == 2 * 2 * 3
    assert a.metrics() == pytest.approx(b.metrics(), abs=1e-3)


def test_of_a_clip_shorter_than_windows_that_are_longer_than_a_tile_each_tile_gets_its_frames(noisy_data, params, shift):
    seen = []

    class Seeing(shift):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    windows = params.model_copy(update={"network": params.network.model_copy(update={"img_size": (16, 48, 48)})})
    evaluation = evaluate(Seeing(-0.1), noisy_data, with_tile(windows, (12, 80, 104), (2, 8, 8)), "test")
    degraded, _ = noisy_data.splits["test"]["wall"]
    # There and back again, with each end twice.
    whole = torch.cat([degraded, degraded.flip(0)] * 2)[:16]
    assert [clip.shape[1] for clip in seen] == [12, 12]
    assert torch.equal(seen[0][0, ..., :100], whole[:12]) and torch.equal(seen[1][0, ..., :100], whole[4:])
    assert evaluation.rows[0].frames == 5 and evaluation.rows[0].scores.restored.psnr == PERFECT_DB


def test_of_many_clips_those_restored_worst_are_shown(make_data, params, shift, texture, monkeypatch):
    monkeypatch.setattr(vrt.evaluation.run, "CLIPS_SHOWN", 2)
    truth = texture(2, 80, 100, seed=1) * 0.5
    brighter = {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.05}
    data = make_data({"test": {name: (truth + amount, truth) for name, amount in brighter.items()}})
    evaluation = evaluate(shift(0.0), data, params, "test")
    assert [row.name for row in evaluation.rows if row.worst_crops] == ["b", "c"]
    assert len(evaluation.rows) == 4


def test_the_preview_is_the_middle_frame_of_the_first_clip(noisy_data, params, shift):
    degraded, truth = noisy_data.splits["val"]["lake"]
    frames = evaluate(shift(-0.02), noisy_data, params, "val").preview_frames
    assert torch.equal(frames.truth, truth[2])
    torch.testing.assert_close(frames.degraded, degraded[2].clamp(0, 1))
    torch.testing.assert_close(frames.restored, degraded[2] - 0.02)


def test_training_goes_on_as_if_nothing_had_been_evaluated(noisy_data, params, shift):
    network = shift(-0.1).train()
    before = torch.get_rng_state()
    evaluate(network, noisy_data, params, "val")
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training and not any(network.modes)
    assert network.amount.grad is None and network.amount.requires_grad


def test_an_empty_split_is_named(make_data, params, shift):
    with pytest.raises(ValueError) as error:
        evaluate(shift(0.0), make_data({}), params, "test")
    assert str(error.value) == "split 'test': expected at least one clip to evaluate, found none; add clips to it and prepare the data again"


def test_a_limit_of_nothing_is_named(noisy_data, params, shift):
    with pytest.raises(ValueError) as error:
        evaluate(shift(0.0), noisy_data, params, "val", limit=0)
    assert str(error.value) == "limit of clips: expected 1 or more, or None for all, found 0; raise it"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_output_is_named_with_its_clip_and_frame(noisy_data, params, shift, bad):
    noisy_data.splits["val"]["tree"][0][3:, 1, 7, 9] = bad
    with pytest.raises(ValueError) as error:
        evaluate(shift(0.0), noisy_data, with_tile(params, (5, 100, 100)), "val")
    assert str(error.value) == (
        "restored clip 'tree': expected finite values, found NaN or infinity in 2 of 5 frames, first in frame 3; "
        "the weights are damaged or the training diverged: go back to an earlier checkpoint, or lower optimizer.lr"
    )


def test_a_truth_of_another_size_is_named(make_data, params, shift, texture):
    truth = texture(4, 32, 32, seed=0)
    with pytest.raises(ValueError) as error:
        evaluate(shift(0.0), make_data({"val": {"lake": (truth[:, :, :16, :16], truth)}}), params, "val")
    assert str(error.value) == ("restored clip 'lake': expected the shape of the truth (4, 3, 32, 32), found (4, 3, 16, 16); prepare the data again")
