"""Layers on frames at the two ends of the network.

Axes: N frames of any clips, C channels, H height, W width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class FrameConv(nn.Conv3d):
    """A 3x3 convolution of every frame by itself, padded to keep the size. (N, C, H, W) -> (N, C_out, H, W).

    The published weights have the shape of a 3D convolution, (C_out, C, 1, 3, 3); it runs as the 2D one it is.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H, W)."""
        return F.conv2d(x, self.weight.squeeze(2), self.bias, padding=1)


class UpsampleBy4(nn.Module):
    """Twice a convolution and a pixel shuffle, then a convolution. (N, C, H, W) -> (N, C, 4H, 4W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The published keys count the layers without weights in between.
        self.add_module("0", FrameConv(channels, 4 * channels))
        self.add_module("5", FrameConv(channels, 4 * channels))
        self.add_module("10", FrameConv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 4H, 4W)."""
        first, second, last = self.children()
        for conv in (first, second):
            x = F.leaky_relu(F.pixel_shuffle(conv(x), 2), 0.1)
        return last(x)
