"""PSNR and SSIM as the restoration papers publish them: of 8-bit images, on RGB and on the luma Y.

Axes: C channels, H height, W width; any number of axes may stand before them. Frames are RGB in [0, 1].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The window and the constants of Wang et al. 2004 (see `ssim`), for grey levels of 0 to 255.
WINDOW = 11
SIGMA = 1.5
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2

# Two equal images have infinite PSNR, which no average and no JSON can hold. One level in one value of a 4K frame is 122 dB.
PERFECT_DB = 120.0


@dataclass(frozen=True)
class Quality:
    """Means over the frames of a clip; PSNR in dB, SSIM in [-1, 1]."""

    psnr: float
    ssim: float
    psnr_y: float
    ssim_y: float


def psnr(restored: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64, one per image: (..., C, H, W) twice -> (...); inf for equal images.

    20 log10(255 / rmse) over all channels together, as KAIR's `calculate_psnr` with border 0.
    Crop both images for another border. Raises ValueError for unequal shapes.
    """
    _same_shape(restored, truth)
    return _psnr(_levels(restored), _levels(truth))


def ssim(restored: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity in [-1, 1], float64, one per image: (..., C, H, W) twice -> (...).

    Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, IEEE TIP 13(4), 2004, with an 11x11 Gaussian of sigma 1.5 where it
    lies wholly inside the image; the mean over pixels and channels, as KAIR's `calculate_ssim` with border 0.
    Raises ValueError for unequal shapes and for images smaller than the window.
    """
    _same_shape(restored, truth)
    return _ssim(_levels(restored), _levels(truth))


def psnr_y(restored: Tensor, truth: Tensor) -> Tensor:
    """`psnr` of the luma of RGB images: (..., 3, H, W) twice -> (...)."""
    _same_shape(restored, truth)
    return _psnr(_luma(_levels(restored)), _luma(_levels(truth)))


def ssim_y(restored: Tensor, truth: Tensor) -> Tensor:
    """`ssim` of the luma of RGB images: (..., 3, H, W) twice -> (...)."""
    _same_shape(restored, truth)
    return _ssim(_luma(_levels(restored)), _luma(_levels(truth)))


def quality(restored: Tensor, truth: Tensor) -> Quality:
    """All four measures, averaged over the frames of a clip: (D, 3, H, W) twice, in [0, 1]. PSNR is capped at PERFECT_DB per frame.

    Raises ValueError as `psnr` and `ssim` do.
    """
    return Quality(*qualities(restored, truth).mean(0).tolist())


def qualities(restored: Tensor, truth: Tensor) -> Tensor:
    """As `quality`, but of each frame: (D, 3, H, W) twice -> (D, 4) in the order of `Quality`."""
    _same_shape(restored, truth)
    # Frame by frame: a long clip in float64, four times over for SSIM, would not fit in memory.
    return torch.stack([_frame_quality(_levels(ours), _levels(real)) for ours, real in zip(restored, truth)])


def _frame_quality(ours: Tensor, real: Tensor) -> Tensor:
    """(3, H, W) grey levels twice -> (4,) in the order of `Quality`."""
    ours_y, real_y = _luma(ours), _luma(real)
    rgb, luma = _psnr(ours, real), _psnr(ours_y, real_y)
    return torch.stack([rgb.clamp(max=PERFECT_DB), _ssim(ours, real), luma.clamp(max=PERFECT_DB), _ssim(ours_y, real_y)])


def _psnr(ours: Tensor, real: Tensor) -> Tensor:
    return 20 * torch.log10(255 / (ours - real).square().mean((-3, -2, -1)).sqrt())


def _ssim(ours: Tensor, real: Tensor) -> Tensor:
    if min(ours.shape[-2:]) < WINDOW:
        found = " x ".join(str(side) for side in ours.shape[-2:])
        raise ValueError(f"SSIM: expected images of at least {WINDOW} x {WINDOW} pixels, found {found}; measure larger images")
    mean_a, mean_b, power, correlation = _blur(torch.stack([ours, real, ours * ours + real * real, ours * real]))
    product, squares = mean_a * mean_b, mean_a * mean_a + mean_b * mean_b
    likeness = (2 * product + C1) * (2 * (correlation - product) + C2)
    return (likeness / ((squares + C1) * (power - squares + C2))).mean((-3, -2, -1))


def _blur(images: Tensor) -> Tensor:
    """Weighted mean under the window, only where all of it lies inside: (..., H, W) -> (..., H - 10, W - 10)."""
    away = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    taps = torch.exp(-away.square() / (2 * SIGMA**2))
    taps = taps / taps.sum()
    planes = images.reshape(-1, 1, *images.shape[-2:])
    planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    return planes.reshape(*images.shape[:-2], *planes.shape[-2:])


def _levels(images: Tensor) -> Tensor:
    """[0, 1] -> the grey levels of the image that would be saved: 0, 1, ... 255, as float64."""
    return images.clamp(0, 1).mul(255).round().double()


def _luma(levels: Tensor) -> Tensor:
    """ITU-R BT.601 luma of RGB grey levels as in MATLAB's rgb2ycbcr, not rounded to levels: (..., 3, H, W) -> (..., 1, H, W) in [16, 235]."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=levels.device)
    luma = (levels * weights.view(3, 1, 1)).sum(-3, keepdim=True) / 255 + 16
    # The published numbers hold luma as float32 in [0, 1]; for almost equal images that rounding shows in the 5th digit of PSNR.
    return luma.div(255).float().mul(255).double()


def _same_shape(restored: Tensor, truth: Tensor) -> None:
    if restored.shape != truth.shape:
        found = f"found restored {tuple(restored.shape)} and truth {tuple(truth.shape)}"
        raise ValueError(f"restored and truth: expected the same shape, {found}; check that network.upscale matches the data")
