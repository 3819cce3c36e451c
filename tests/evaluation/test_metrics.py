"""PSNR and SSIM equal the published code's numbers (`psnr_ssim.pt`) to the last digits of float64."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vrt.evaluation.metrics import PERFECT_DB, psnr, psnr_y, quality, ssim, ssim_y

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evaluation" / "psnr_ssim.pt"
MEASURES = {"psnr": psnr, "ssim": ssim, "psnr_y": psnr_y, "ssim_y": ssim_y}


@cache
def published_pairs() -> list[dict]:
    return torch.load(FIXTURE, weights_only=True)["pairs"]


def as_frame(bgr: Tensor) -> Tensor:
    """(H, W, 3) BGR or (H, W) grey, uint8 -> (C, H, W) RGB in [0, 1]."""
    planes = bgr[None] if bgr.ndim == 2 else bgr.permute(2, 0, 1).flip(0)
    return planes.float() / 255


def random_frames(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("pair", range(9))
def test_equals_the_published_number(pair, border, measure):
    published = published_pairs()[pair]
    key = f"{measure}_b{border}"
    if key not in published:
        assert published["tag"] == "gray_2d", "only the grey pair has no luma"
        return
    images = [as_frame(published[name]) for name in ("img1_bgr", "img2_bgr")]
    ours, real = (image[:, border : image.shape[1] - border, border : image.shape[2] - border] for image in images)
    assert MEASURES[measure](ours, real).item() == pytest.approx(published[key], abs=1e-11)


def test_the_fixture_holds_every_pair():
    assert len(published_pairs()) == 9


@given(levels=st.integers(1, 100))
@settings(deadline=None, max_examples=20)
def test_an_even_offset_has_the_psnr_of_the_formula(levels):
    truth = torch.full((3, 12, 12), 20 / 255)
    assert psnr(truth + levels / 255, truth).item() == pytest.approx(20 * math.log10(255 / levels), abs=1e-9)


@given(seed=st.integers(0, 10**6), strength=st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_measures_are_symmetric_and_ssim_is_bounded(seed, strength):
    a = random_frames(3, 16, 20, seed=seed)
    b = (1 - strength) * a + strength * random_frames(3, 16, 20, seed=seed + 1)
    for measure in MEASURES.values():
        torch.testing.assert_close(measure(a, b), measure(b, a), rtol=1e-12, atol=1e-12)
    assert -1 <= ssim(a, b) <= 1
    assert -1 <= ssim_y(a, b) <= 1


@pytest.mark.parametrize("measure", MEASURES)
def test_many_images_at_once_equal_one_by_one(measure):
    a, b = random_frames(2, 3, 3, 14, 17, seed=1), random_frames(2, 3, 3, 14, 17, seed=2)
    together = MEASURES[measure](a, b)
    assert together.shape == (2, 3) and together.dtype == torch.float64
    alone = torch.stack([MEASURES[measure](x, y) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]).view(2, 3)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_images_are_measured_as_they_would_be_saved():
    saved = torch.tensor([0, 100, 255]).view(3, 1, 1).expand(3, 12, 12) / 255
    between_levels = saved + torch.tensor([-0.3, 0.4 / 255, 0.5]).view(3, 1, 1)
    assert psnr(between_levels, saved).item() == math.inf


def test_quality_is_the_mean_over_frames():
    restored, truth = random_frames(3, 3, 16, 16, seed=3), random_frames(3, 3, 16, 16, seed=4)
    measured = quality(restored, truth)
    for name, measure in MEASURES.items():
        assert getattr(measured, name) == pytest.approx(measure(restored, truth).mean().item(), abs=1e-12)


def test_quality_of_equal_frames_is_finite():
    truth = random_frames(2, 3, 16, 16)
    measured = quality(truth, truth)
    assert (measured.psnr, measured.psnr_y) == (PERFECT_DB, PERFECT_DB)
    assert (measured.ssim, measured.ssim_y) == pytest.approx((1, 1), abs=1e-12)


@pytest.mark.parametrize("measure", [*MEASURES.values(), quality])
def test_unequal_shapes_are_named(measure):
    with pytest.raises(ValueError) as error:
        measure(torch.zeros(1, 3, 12, 12), torch.zeros(1, 3, 48, 48))
    assert str(error.value) == (
        "restored and truth: expected the same shape, found restored (1, 3, 12, 12) and truth (1, 3, 48, 48); "
        "check that network.upscale matches the data"
    )


def test_an_image_smaller_than_the_window_is_named():
    with pytest.raises(ValueError) as error:
        ssim(torch.zeros(3, 10, 40), torch.zeros(3, 10, 40))
    assert str(error.value) == "SSIM: expected images of at least 11 x 11 pixels, found 10 x 40; measure larger images"
