"""What the degradation of the params makes of sharp frames: for training samples and evaluated clips alike.

Clips are float32 (D, C, H, W), RGB, in [0, 1].
"""

import numpy as np
import torch
from torch import Tensor

from vrt.data.degradations import add_noise, bicubic_downsample, blur_downsample, motion_blur
from vrt.params import Bicubic, BlurDown, Params


def reduced(truth: Tensor, reduction: Bicubic | BlurDown) -> Tensor:
    """(D, 3, H, W) -> (D, 3, H / scale, W / scale)."""
    if isinstance(reduction, Bicubic):
        return rounded(bicubic_downsample(truth, reduction.scale))
    return rounded(blur_downsample(truth, reduction.scale, reduction.sigma))


def rounded(clip: Tensor) -> Tensor:
    """To 8 bits, as the degraded frames of published data sets (and of users) are stored."""
    return (clip * 255).round().clamp(0, 255) / 255


def exposures(frames: Tensor, exposed: int) -> tuple[Tensor, Tensor]:
    """Blurred frames, rounded to 8 bits, and the sharp one in the middle of each: (D // exposed, C, H, W) twice; a rest is cut off."""
    whole = frames[: len(frames) // exposed * exposed]
    return rounded(motion_blur(whole, exposed)), whole[exposed // 2 :: exposed]


def with_noise(truth: Tensor, sigma: float, rng: np.random.Generator, params: Params) -> Tensor:
    """With white Gaussian noise; (D, 3, H, W), or (D, 4, H, W) with its level (sigma / 255) where the network wants to be told."""
    noisy = add_noise(truth, sigma, rng)
    if not params.network.nonblind_denoising:
        return noisy
    return torch.cat([noisy, torch.full_like(truth[:, :1], sigma / 255)], dim=1)


def as_floats(pixels: np.ndarray) -> Tensor:
    """uint8 or uint16 (D, H, W, 3) -> float32 (D, 3, H, W) in [0, 1]"""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / np.iinfo(pixels.dtype).max
