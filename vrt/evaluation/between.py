"""Frame interpolation as the restoration of a clip: each frame to make is one frame of it, with its given neighbours as channels.

So tiles, borders and measures are those of every other task. Axes: B batch, D frames to make, G given frames around each, H height, W width.
"""

import torch
from torch import Tensor, nn


def group(given: Tensor, size: int) -> Tensor:
    """(B, N, 3, H, W) -> (B, N - size + 1, size * 3, H, W): each `size` consecutive frames as the channels of one."""
    made = given.shape[1] - size + 1
    return torch.cat([given[:, k : k + made] for k in range(size)], dim=2)


class Interpolating(nn.Module):
    """A network that makes the frame in the middle of G, applied to every group of a clip."""

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, groups: Tensor) -> Tensor:
        """(B, D, G * 3, H, W) -> (B, D, 3, H, W)."""
        made = self.network(groups.flatten(0, 1).unflatten(1, (self.size, 3)))
        return made.flatten(0, 1).unflatten(0, groups.shape[:2])
