"""What one has without the network: the yardstick of every gain.

Axes: D frames, C channels, H height, W width of the truth; lower-case h, w are those of the input.
"""

import torch.nn.functional as F
from torch import Tensor


def neighbours_mean(groups: Tensor, given: int) -> Tensor:
    """What one has of a frame in between without the network: the mean of the frames before and after it.

    groups: (D, given * 3, H, W), the frames that each of D frames is made from, in order. Returns (D, 3, H, W) in [0, 1].
    """
    return groups.unflatten(1, (given, 3))[:, given // 2 - 1 : given // 2 + 1].mean(1)


def baseline(degraded: Tensor, height: int, width: int) -> Tensor:
    """The input as RGB in the size of the truth: (D, C >= 3, h, w) -> (D, 3, height, width) in [0, 1].

    A noise map behind the colours is left out. A smaller input is enlarged bicubically (a = -0.75, no anti-aliasing) and clamped.
    """
    colours = degraded[:, :3]
    if colours.shape[-2:] != (height, width):
        colours = F.interpolate(colours, size=(height, width), mode="bicubic", align_corners=False, antialias=False)
    return colours.clamp(0, 1)
