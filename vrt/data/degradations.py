"""How clean clips are degraded, and how short ones are continued: pure functions of the clip and, for noise, of a generator.

Clips are float32 (D, 3, H, W), RGB, in [0, 1]. Only elementwise arithmetic in a fixed order, so neither the number of
threads nor the process changes a bit of the result.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# How far around its own `scale` x `scale` block a bicubically reduced pixel looks, in such blocks (1.5 of them, rounded up).
BICUBIC_REACH = 2


def add_noise(clip: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """`clip` with white Gaussian noise of standard deviation `sigma` grey levels (0 to 255).

    Not clipped to [0, 1] afterwards: clipped noise is no longer Gaussian, and the published denoiser is trained without.
    """
    noise = torch.from_numpy(rng.standard_normal(tuple(clip.shape), dtype=np.float32))
    return clip + noise * (sigma / 255)


def bicubic_downsample(clip: Tensor, scale: int) -> Tensor:
    """(D, 3, H, W) -> (D, 3, H/scale, W/scale), as MATLAB's imresize(clip, 1/scale) does, which published data sets use.

    Cubic convolution with a = -0.5 (Keys 1981, "Cubic convolution interpolation for digital image processing"), stretched
    by `scale` against aliasing, borders mirrored with the edge pixel repeated. May overshoot [0, 1] at edges.
    Raises ValueError where H or W is no multiple of `scale`.
    """
    _check_divides("bicubic reduction", clip, scale)
    weights = bicubic_weights(scale)
    for dim in (-2, -1):
        clip = _reduce(clip, scale, dim, weights, -(3 * scale // 2), _mirrored)
    return clip


def blur_downsample(clip: Tensor, scale: int, sigma: float) -> Tensor:
    """(D, 3, H, W) -> (D, 3, H/scale, W/scale): Gaussian blur of `sigma` pixels, then one pixel of each block. `scale` is even.

    As BasicVSR and VRT's other predecessors make their blur-down sets (mmagic issue 551 names RCAN's script, RCAN issue 95 quotes
    it): the kernel has the even side 2 ceil(3 sigma) + 2, 12 for 1.6, so that each output lies at the centre of its block, as in the
    bicubic reduction; borders repeat the edge pixel. DUF's variant has 13 taps and samples the first pixel of each block, 1.5 pixels
    off: a network trained on the one fails on the other (mmagic issue 318).
    Raises ValueError where H or W is no multiple of `scale`.
    """
    _check_divides("blur-down reduction", clip, scale)
    weights = gaussian_weights(sigma)
    for dim in (-2, -1):
        clip = _reduce(clip, scale, dim, weights, scale // 2 - len(weights) // 2, _repeated)
    return clip


def blur_reach(scale: int, sigma: float) -> int:
    """How far around its own block a pixel of `blur_downsample` looks, in blocks."""
    return math.ceil((len(gaussian_weights(sigma)) - scale) / 2 / scale)


def motion_blur(clip: Tensor, frames: int) -> Tensor:
    """(D, 3, H, W) -> (D / frames, 3, H, W): the mean of each `frames` consecutive frames, as a shutter that stays open for them sees.

    As GoPro's blurred frames are made from a high-speed camera's (Nah et al., "Deep multi-scale convolutional neural network for dynamic
    scene deblurring", CVPR 2017, their set without gamma). Raises ValueError where D is no multiple of `frames`.
    """
    if len(clip) % frames:
        raise ValueError(
            f"motion blur: expected a number of frames divisible by {frames}, found {len(clip)}; cut the clip to {len(clip) // frames * frames}"
        )
    total = torch.zeros_like(clip[::frames])
    for offset in range(frames):
        total += clip[offset::frames]
    return total / frames


def gaussian_weights(sigma: float) -> np.ndarray:
    """(2 ceil(3 sigma) + 2,) weights, sum 1, symmetric about the point between the middle two."""
    side = 2 * math.ceil(3 * sigma) + 2
    weights = np.exp(-((np.arange(side) - (side - 1) / 2) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def bicubic_weights(scale: int) -> np.ndarray:
    """(4 * scale,) weights, sum 1, of the input pixels around each output pixel.

    Output i lies at input position i * scale + (scale - 1) / 2; the first weight belongs to input i * scale - 3 * scale / 2
    (rounded down to a whole pixel), the rest follow.
    """
    first = -(3 * scale // 2)
    x = np.abs(np.arange(first, first + 4 * scale) - (scale - 1) / 2) / scale
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum()


def continue_backwards(clip: Tensor, frames: int) -> Tensor:
    """(..., D, C, H, W) -> (..., frames, C, H, W): the clip followed by its own frames, last one first; `clip` itself where it has enough."""
    length = clip.shape[-4]
    if length >= frames:
        return clip
    return clip.index_select(-4, _mirrored(torch.arange(frames, device=clip.device), length))


def _check_divides(what: str, clip: Tensor, scale: int) -> None:
    for name, size in zip(("height", "width"), clip.shape[-2:]):
        if size % scale:
            raise ValueError(f"{what}: expected a {name} divisible by {scale}, found {size}; crop the clip to {size - size % scale}")


def _mirrored(positions: Tensor, size: int) -> Tensor:
    """Positions beyond the ends 0 and size - 1 mirrored with the edge repeated: ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ..."""
    around = positions % (2 * size)
    return torch.minimum(around, 2 * size - 1 - around)


def _repeated(positions: Tensor, size: int) -> Tensor:
    """Positions beyond the ends moved to the edge: ... 0 0 | 0 1 2 ... n-1 | n-1 n-1 ..."""
    return positions.clamp(0, size - 1)


def _reduce(clip: Tensor, scale: int, dim: int, weights: np.ndarray, first: int, border: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Weighted sums around every `scale`-th place; the first weight belongs to input i * scale + `first`."""
    size = clip.shape[dim]
    total = torch.zeros_like(clip.narrow(dim, 0, size // scale))
    for offset, weight in enumerate(weights, start=first):
        total += clip.index_select(dim, border(torch.arange(0, size, scale) + offset, size)) * float(weight)
    return total
