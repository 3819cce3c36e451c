"""Deformable alignment: each frame's neighbours, brought to where the frame shows the same things.

Axes: B clips, D frames, C channels, H height, W width; N any batch of frames; R reach, the neighbours on one side of a frame;
G deformable groups; K kernel taps, row by row.
"""

import math

import torch
from torch import Tensor, nn

from vrt.model.linear import runs_eagerly_on_cpu
from vrt.model.recompute import in_parts
from vrt.model.warp import back_in_time, both_ways, pad_frames, pixel_axes, sample, warp


def deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Modulated deformable convolution (Zhu et al., arXiv 1811.11168), stride 1, output as large as the input.

    x: (N, C, H, W); offset: (N, 2GK, H, W), pixels, per group and tap (dy, dx); mask: (N, GK, H, W), usually in [0, 1];
    weight: (C_out, C // groups, k, k), k odd; bias: (C_out) or None. Returns (N, C_out, H, W).
    Taps between pixels are read bilinearly, pixels outside the frame are 0.
    """
    n, channels, height, width = x.shape
    out_channels, _, kernel, _ = weight.shape
    taps = kernel**2
    deformable_groups = mask.shape[1] // taps
    tap = torch.arange(taps, dtype=offset.dtype, device=offset.device).view(taps, 1, 1)
    own_x, own_y = pixel_axes(height, width, like=offset)
    dy, dx = offset.view(n * deformable_groups, taps, 2, height, width).unbind(2)
    at_x = (dx + (own_x + tap % kernel - kernel // 2)).flatten(1, 2)
    at_y = (dy + (own_y + tap // kernel - kernel // 2)).flatten(1, 2)
    grouped = x.reshape(n * deformable_groups, channels // deformable_groups, height, width)
    values = sample(grouped, at_x, at_y).view(n * deformable_groups, -1, taps, height * width)
    columns = (values * mask.view(n * deformable_groups, 1, taps, height * width)).view(n, groups, -1, height * width)
    kernels = weight.view(groups, out_channels // groups, -1)
    out = (kernels @ columns).view(n, out_channels, height, width)
    return out if bias is None else out + bias.view(-1, 1, 1)


class ParallelAlignment(nn.Module):
    """Align the features of all neighbours of all frames, in both directions of time, in one batched deformable convolution.

    The offsets are the optical flow plus what four convolutions on the flow-warped neighbours add to it, at most `max_offset` pixels.

    On CPUs a training computes each frame again for its gradient. `keep` does without that, where all of it is computed again anyway.
    """

    def __init__(self, dim: int, reach: int, deformable_groups: int, max_offset: float, keep: bool = False) -> None:
        super().__init__()
        self.dim, self.reach, self.max_offset, self.keep = dim, reach, max_offset, keep
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3))
        self.bias = nn.Parameter(torch.empty(dim))
        self.conv_offset = nn.Sequential(
            nn.Conv2d((1 + reach) * dim + 2 * reach, dim, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(dim, 27 * deformable_groups, 3, padding=1),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the plain flow: the last layer that adds to it is zero."""
        bound = 1 / math.sqrt(self.dim * 9)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.conv_offset[-1].weight)
        nn.init.zeros_(self.conv_offset[-1].bias)

    def forward(self, x: Tensor, flows: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, D, H, W, C) with D >= 2; flows: (2B, D-1, R, 2, H, W), as `extend_reach` gives them for `both_ways`.

        Returns two of (B, D, H, W, C): what the frames to the right and to the left of each frame show, aligned to it; zeros where there is none.
        """
        clips = both_ways(x.permute(0, 1, 4, 2, 3).contiguous())
        batch, depth, channels, height, width = clips.shape
        n = batch * (depth - 1)
        ahead = [pad_frames(clips[:, i:], depth - 1) for i in range(1, self.reach + 1)]
        neighbours = torch.stack(ahead, dim=2).view(n, self.reach, channels, height, width)
        current = clips[:, :-1].reshape(n, channels, height, width)
        flows = flows.reshape(n, self.reach, 2, height, width)
        guess = self._guess(neighbours, current, flows)
        if runs_eagerly_on_cpu(x):
            # Nine values per pixel and channel lie between input and output: frame by frame they stay in the cache.
            aligned = in_parts(self._align, 1, (neighbours, guess, flows), (self.weight, self.bias), keep=self.keep)
        else:
            aligned = self._align(slice(None), neighbours, guess, flows)
        from_right, from_left = back_in_time(pad_frames(aligned.view(batch, depth - 1, channels, height, width), depth))
        return from_right.permute(0, 1, 3, 4, 2), from_left.permute(0, 1, 3, 4, 2)

    def _guess(self, neighbours: Tensor, current: Tensor, flows: Tensor) -> Tensor:
        """neighbours (N, R, C, H, W), current (N, C, H, W), flows (N, R, 2, H, W) -> what offsets and masks are made of, (N, 3GK, H, W)."""
        warped = warp(neighbours.flatten(0, 1), flows.flatten(0, 1)).view(current.shape[0], -1, *current.shape[2:])
        return self.conv_offset(torch.cat((warped, current, flows.flatten(1, 2).to(current.dtype)), dim=1)).to(flows.dtype)

    def _align(self, _: slice, neighbours: Tensor, guess: Tensor, flows: Tensor) -> Tensor:
        """neighbours (N, R, C, H, W), guess (N, 3GK, H, W), flows (N, R, 2, H, W) -> (N, C, H, W)."""
        residual, mask = guess.split((guess.shape[1] // 3 * 2, guess.shape[1] // 3), dim=1)
        residual = residual.view(*flows.shape[:2], -1, *flows.shape[2:])
        offset = self.max_offset * residual.tanh() + flows.flip(2).unsqueeze(2)
        return deform_conv2d(neighbours.flatten(1, 2), offset.flatten(1, 3), mask.sigmoid(), self.weight, self.bias, groups=self.reach)
