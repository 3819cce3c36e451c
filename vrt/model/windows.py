"""Windows: how a feature map is cut into them, shifted, masked, and what encodes positions inside them.

Axes: B clips, D frames, H height, W width, C channels; M windows of a map; N tokens of a window, in the order (d, h, w).
Sizes, windows and shifts are (frames, height, width).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int, int]


def fit_window(size: Size, window: Size, shift: Size, least_depth: int) -> tuple[Size, Size]:
    """The window and shift used on a map of `size`: where the map is no larger than the window, the window shrinks to it and the shift is 0.

    The depth never shrinks below `least_depth`: mutual attention needs two frames, and gets zeros for a missing one.
    """
    fitted = tuple(min(s, w) for s, w in zip(size, window))
    kept = tuple(0 if s <= w else k for s, w, k in zip(size, window, shift))
    return (max(fitted[0], least_depth), *fitted[1:]), kept


def padded_size(size: Size, window: Size) -> Size:
    """The size of a map after it was padded to multiples of the window."""
    return tuple(-(-s // w) * w for s, w in zip(size, window))


def partition(x: Tensor, window: Size, shift: Size) -> tuple[Tensor, Size]:
    """Cut maps into windows. (B, D, H, W, C) -> (B * M, N, C), and the size after padding.

    The map is zero-padded at its ends to multiples of the window, then rolled back by the shift.
    """
    padding = [padded - s for padded, s in zip(padded_size(x.shape[1:4], window), x.shape[1:4])]
    if any(padding):
        x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
    if any(shift):
        x = x.roll([-s for s in shift], dims=(1, 2, 3))
    batch, depth, height, width, channels = x.shape
    d, h, w = window
    x = x.view(batch, depth // d, d, height // h, h, width // w, w, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(-1, d * h * w, channels), (depth, height, width)


def merge(windows: Tensor, padded: Size, size: Size, window: Size, shift: Size) -> Tensor:
    """Undo `partition`: (B * M, N, C) -> (B, D, H, W, C)."""
    counts = [s // w for s, w in zip(padded, window)]
    x = windows.view(-1, *counts, *window, windows.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *padded, windows.shape[-1])
    if any(shift):
        x = x.roll(shift, dims=(1, 2, 3))
    return x[:, : size[0], : size[1], : size[2]] if padded != size else x


SEPARATION = -100.0
"""Added to the score of two tokens that must not see one another, as in the published network."""


@dataclass(frozen=True)
class Separation:
    """Which tokens of shifted windows must not see one another: those that the cyclic shift brought together from opposite ends of the map."""

    masks: Tensor
    """(8, N, N), 0 or SEPARATION: for each way in which a window can be cut along the three axes, not for each window. The first is all 0."""
    pattern: Tensor
    """(M), int64: the pattern of each window of a map."""

    def scores(self, part: slice, windows: int, tokens: int) -> Tensor | None:
        """(windows in part, 1, N, N): what to add to the scores of the first `tokens` tokens of the windows in `part`, of `windows` in all
        (M per clip); None where it would be nothing.
        """
        own = self.pattern.repeat(windows // len(self.pattern))[part]
        if own.device.type == "cpu" and not torch.compiler.is_compiling() and not own.any():
            return None
        return self.masks[own, :tokens, :tokens].unsqueeze(1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a training after a validation in inference mode would find tensors that autograd refuses
def separate(padded: Size, window: Size, shift: Size, device: torch.device) -> Separation:
    """The separation on a map of the size `padded` (Liu et al., arXiv 2103.14030)."""
    pattern = torch.zeros(1, 1, 1, dtype=torch.long)
    # Cut or not along each axis, then the position in the window.
    labels = torch.zeros(1, 1, 1, 1, 1, 1, dtype=torch.long)
    for axis, (p, w, s) in enumerate(zip(padded, window, shift)):
        # Only the last window along an axis is cut: the shift put into it what lay at the axis's start.
        is_cut = (torch.arange(p // w) == p // w - 1) & (s > 0)
        behind_cut = torch.stack((torch.zeros(w, dtype=torch.bool), torch.arange(w) >= w - s))
        pattern = pattern * 2 + is_cut.view([-1 if i == axis else 1 for i in range(3)])
        labels = labels * 2 + behind_cut.view([2 if i == axis else w if i == axis + 3 else 1 for i in range(6)])
    labels = labels.reshape(8, -1)
    differ = labels.unsqueeze(1) != labels.unsqueeze(2)
    return Separation((differ.float() * SEPARATION).to(device), pattern.flatten().to(device))


def relative_position_index(window: Size) -> Tensor:
    """(N, N), int64: for each pair of tokens the row of the bias table that belongs to their relative position."""
    axes = torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")
    index = torch.zeros((), dtype=torch.long)
    for axis, w in zip(axes, window):
        position = axis.flatten()
        index = index * (2 * w - 1) + (position[:, None] - position[None, :] + w - 1)
    return index


def sine_encoding(height: int, width: int, dim: int) -> Tensor:
    """(1, H * W, dim), in [-1, 1]: sines and cosines of the position, the first half of the channels for y, the second for x.

    Positions 1 .. size are scaled to 2 pi; wavelengths rise geometrically to 10000 (Carion et al., arXiv 2005.12872).
    """
    half = dim // 2
    channel = torch.arange(half, dtype=torch.float32)
    wavelength = 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / half)
    encoded = []
    for size in (height, width):
        position = torch.arange(1, size + 1, dtype=torch.float32) / (size + 1e-6) * (2 * torch.pi)
        angle = position[:, None] / wavelength
        encoded.append(torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1))
    y, x = encoded
    grid = torch.cat((y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)), dim=2)
    return grid.reshape(1, height * width, dim)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # as for `separate`
def shrunk_sine_encoding(height: int, width: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`sine_encoding` for a window that had to shrink, rounded to float32 first, as that of the full window is."""
    return sine_encoding(height, width, dim).to(device, dtype)
