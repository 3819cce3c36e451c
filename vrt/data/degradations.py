"""How clean clips are degraded: pure functions of the clip and, for noise, of a generator.

Clips are float32 (D, 3, H, W), RGB, in [0, 1]. Only elementwise arithmetic in a fixed order, so neither the number of
threads nor the process changes a bit of the result.
"""

import numpy as np
import torch
from torch import Tensor

# How far around its own `scale` x `scale` block a reduced pixel looks, in such blocks (1.5 of them, rounded up).
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
    for name, size in zip(("height", "width"), clip.shape[-2:]):
        if size % scale:
            raise ValueError(f"bicubic reduction: expected a {name} divisible by {scale}, found {size}; crop the clip to {size - size % scale}")
    return _reduce(_reduce(clip, scale, dim=-2), scale, dim=-1)


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


def _reduce(clip: Tensor, scale: int, dim: int) -> Tensor:
    size = clip.shape[dim]
    weights = bicubic_weights(scale)
    first = -(3 * scale // 2)
    total = torch.zeros_like(clip.narrow(dim, 0, size // scale))
    for offset, weight in enumerate(weights, start=first):
        # Mirrored with the edge repeated: ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ...
        position = (torch.arange(0, size, scale) + offset) % (2 * size)
        total += clip.index_select(dim, torch.minimum(position, 2 * size - 1 - position)) * float(weight)
    return total
