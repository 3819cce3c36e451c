"""Optical flows and what they do to frames: warping, gathering, composing.

Axes: B clips, D frames, C channels, H height, W width; N any batch of frames; R reach, the neighbours on one side of a frame.
A flow has two channels, (x, y), in pixels: the value at (y, x) is read from (y + flow_y, x + flow_x).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME = (1, 1, 1, 1)
"""Zeros around an image, which stand for everything outside: no value read there needs a mask."""
POINTS_AT_ONCE = 2**22
"""PyTorch's kernel for the gradient of weighted sums of rows numbers its threads, 128 for a point, in 32 bits, and does not look whether they fit."""


def both_ways(x: Tensor) -> Tensor:
    """A clip and, after it in the batch, the same clip played backwards: (B, D, ...) -> (2B, D, ...).

    In both halves the neighbours to align lie ahead in time, so one batched call serves both directions.
    """
    return torch.cat((x, x.flip(1)))


def back_in_time(x: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `both_ways`: (2B, D, ...) -> two of (B, D, ...), frames in the clip's own order: from the right, from the left neighbour."""
    from_right, from_left = x.chunk(2)
    return from_right, from_left.flip(1)


def pixel_axes(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The x (W) and y (H, 1) coordinates of the pixels, in the dtype and on the device of `like`."""
    x = torch.arange(width, dtype=like.dtype, device=like.device)
    y = torch.arange(height, dtype=like.dtype, device=like.device)
    return x, y.unsqueeze(1)


def sample(x: Tensor, at_x: Tensor, at_y: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Read frames at points between pixels, bilinearly.

    x: (N, C, H, W); at_x, at_y: (N, h, w), pixels. Returns (N, C, h, w) in the dtype of the points.
    padding_mode: "zeros" (a pixel outside the frame is 0) or "border" (points are moved to the nearest edge, and must be numbers: for NaN
    PyTorch's gradient on CPUs writes outside its memory).
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        # PyTorch's own sampling adds up the gradient of a pixel there in an order that varies from run to run.
        return sample_in_order(x, at_x, at_y, padding_mode)
    height, width = x.shape[-2:]
    # In the convention of align_corners=False pixel p sits at (2p + 1) / size - 1. Unlike the other one it also holds for a size of 1.
    grid = torch.stack((at_x * (2 / width) + (1 / width - 1), at_y * (2 / height) + (1 / height - 1)), dim=-1)
    return F.grid_sample(x.to(grid.dtype), grid, mode="bilinear", padding_mode=padding_mode, align_corners=False)


def sample_in_order(x: Tensor, at_x: Tensor, at_y: Tensor, padding_mode: str) -> Tensor:
    """What `sample` gives, by a weighted sum of rows of a table, whose gradient is added up in a fixed order on every device."""
    n, channels, height, width = x.shape
    if padding_mode == "border":
        at_x, at_y = _moved_inside(at_x, width), _moved_inside(at_y, height)
    left, top = at_x.detach().floor(), at_y.detach().floor()
    right_share, bottom_share = at_x - left, at_y - top
    columns, rows = _framed(left, left + 1, width), [row * (width + 2) for row in _framed(top, top + 1, height)]
    table = F.pad(x.to(at_x.dtype), FRAME).permute(0, 2, 3, 1).reshape(-1, channels)
    own_rows = torch.arange(n, device=x.device).view(n, 1, 1) * ((height + 2) * (width + 2))
    index = torch.stack([own_rows + row + column for row in rows for column in columns], dim=-1)
    shares = torch.stack([v * h for v in (1 - bottom_share, bottom_share) for h in (1 - right_share, right_share)], dim=-1)
    few = zip(index.view(-1, 4).split(POINTS_AT_ONCE), shares.view(-1, 4).split(POINTS_AT_ONCE))
    sampled = torch.cat([F.embedding_bag(rows, table, mode="sum", per_sample_weights=own) for rows, own in few])
    return sampled.view(n, *at_x.shape[1:], channels).permute(0, 3, 1, 2).contiguous()


def _framed(low: Tensor, high: Tensor, size: int) -> list[Tensor]:
    """Whole pixels of an axis of `size`, before and after some points, as places of an image with a FRAME around it.

    A point that is no number lies outside: as an index NaN would lead anywhere in memory.
    """
    return [pixel.nan_to_num(nan=-1.0).clamp(-1, size).long() + 1 for pixel in (low, high)]


def _moved_inside(at: Tensor, size: int) -> Tensor:
    """Points moved to the nearest pixel of an axis; none on the edge or beyond it has a gradient."""
    return torch.where((at > 0) & (at < size - 1), at, at.detach().clamp(0, size - 1))


def warp(x: Tensor, flow: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Warp frames by flows, bilinearly. x: (N, C, H, W); flow: (N, 2, H, W), pixels; `padding_mode` as for `sample`. Returns (N, C, H, W)."""
    own_x, own_y = pixel_axes(*flow.shape[-2:], like=flow)
    return sample(x, flow[:, 0] + own_x, flow[:, 1] + own_y, padding_mode)


def gather_nearest4(x: Tensor, flow: Tensor) -> Tensor:
    """The four pixels around every sampling point, unmixed ("nearest4").

    x: (N, C, H, W); flow: (N, 2, H, W), pixels. Returns (N, 4C, H, W): the pixels at (floor x, floor y), (floor x, ceil y),
    (ceil x, floor y), (ceil x, ceil y), each with C channels; 0 outside the frame, and where the flow is NaN. No gradient
    reaches the flow.
    """
    n, channels, height, width = x.shape
    own_x, own_y = pixel_axes(height, width, like=flow)
    at_x, at_y = flow[:, 0].detach() + own_x, flow[:, 1].detach() + own_y
    columns, rows = _framed(at_x.floor(), at_x.ceil(), width), [row * (width + 2) for row in _framed(at_y.floor(), at_y.ceil(), height)]
    index = torch.stack([row + column for column in columns for row in rows], dim=1)
    padded = F.pad(x, FRAME).flatten(2)
    pixels = padded.gather(2, index.view(n, 1, -1).expand(-1, channels, -1))
    return pixels.view(n, channels, 4, height, width).transpose(1, 2).flatten(1, 2)


def extend_reach(flows: Tensor, reach: int) -> Tensor:
    """Flows to neighbours further ahead, composed of the flows between adjacent frames: f1 + warp(f2, f1).

    flows: (B, D-1, 2, H, W), frame t to t+1. Returns (B, D-1, R, 2, H, W): frame t to t+1 .. t+R; zeros beyond the clip's end.
    """
    pairs = flows.shape[1]
    ahead = [flows]
    for distance in range(2, reach + 1):
        reaching = max(pairs + 1 - distance, 0)
        here, onward = ahead[-1][:, :reaching].flatten(0, 1), flows[:, distance - 1 :].flatten(0, 1)
        ahead.append((here + warp(onward, here)).view(-1, reaching, *flows.shape[2:]) if reaching else flows[:, :0])
    return torch.stack([pad_frames(f, pairs) for f in ahead], dim=2)


def pad_frames(x: Tensor, depth: int) -> Tensor:
    """Append frames of zeros, up to `depth`: (B, D, ...) -> (B, depth, ...)."""
    missing = depth - x.shape[1]
    return torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1) if missing else x
