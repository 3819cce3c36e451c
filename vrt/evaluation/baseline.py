"""What one has without the network: the yardstick of every gain.

Axes: D frames, C channels, H height, W width of the truth; lower-case h, w are those of the input.
"""

import torch.nn.functional as F
from torch import Tensor


def baseline(degraded: Tensor, height: int, width: int) -> Tensor:
    """The input as RGB in the size of the truth: (D, C >= 3, h, w) -> (D, 3, height, width) in [0, 1].

    A noise map behind the colours is left out. A smaller input is enlarged bicubically (a = -0.75, no anti-aliasing) and clamped.
    """
    colours = degraded[:, :3]
    if colours.shape[-2:] != (height, width):
        colours = F.interpolate(colours, size=(height, width), mode="bicubic", align_corners=False, antialias=False)
    return colours.clamp(0, 1)
