"""SpyNet: optical flow, coarse to fine (Ranjan and Black, arXiv 1611.00850).

Axes: N pairs of frames, C channels, H height, W width. Flows have two channels, (x, y), in pixels of their own scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrt.model.warp import warp

LEVELS = 6
RETURNED = 4
MULTIPLE = 2 ** (LEVELS - 1)


class FlowLevel(nn.Module):
    """One level of the pyramid: five 7x7 convolutions. (N, 8, H, W): reference, warped other frame, flow -> (N, 2, H, W), what to add to the flow."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 32, 64, 32, 16, 2)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 7, padding=3), nn.ReLU(inplace=True)]
        self.basic_module = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, H, W) -> (N, 2, H, W), in pixels of this level."""
        return self.basic_module(x)


class SpyNet(nn.Module):
    """Flow between frames, at the scales 1, 1/2, 1/4 and 1/8."""

    def __init__(self) -> None:
        super().__init__()
        self.basic_module = nn.ModuleList([FlowLevel() for _ in range(LEVELS)])
        # The mean and spread of ImageNet's RGB values, on which the published flow weights were trained.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, clips: Tensor) -> list[Tensor]:
        """The flow from each frame to the next.

        clips: (B, D, 3, H, W) with D >= 2, RGB in [0, 1]. Returns four tensors (B, D-1, 2, H // s, W // s) for s = 1, 2, 4, 8, in at least
        float32: flow t warps frame t+1 to frame t.
        """
        # Half precision would place flows on a grid of whole pixels at widths above 1000.
        with torch.autocast(clips.device.type, enabled=False):
            batch, depth, _, height, width = clips.shape
            dtype = torch.promote_types(clips.dtype, torch.float32)
            frames = self._pyramid(clips.flatten(0, 1).to(dtype))
            pyramid = [level.view(batch, depth, *level.shape[1:]) for level in frames]
            flows = self._coarse_to_fine([(p[:, :-1].flatten(0, 1), p[:, 1:].flatten(0, 1)) for p in pyramid])
            scaled = [_rescale(flow, height // 2**i, width // 2**i) for i, flow in enumerate(reversed(flows[-RETURNED:]))]
            return [flow.view(batch, depth - 1, *flow.shape[1:]) for flow in scaled]

    def _pyramid(self, frames: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> normalised frames at LEVELS scales, coarsest first; the finest has the next multiples of 32 as sides."""
        size = [-(-side // MULTIPLE) * MULTIPLE for side in frames.shape[-2:]]
        levels = [(F.interpolate(frames, size, mode="bilinear", align_corners=False) - self.mean) / self.std]
        for _ in range(LEVELS - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return levels[::-1]

    def _coarse_to_fine(self, pyramid: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """[(reference, other)], coarsest first -> the flow at every level."""
        reference, other = pyramid[0]
        flow = torch.zeros_like(reference[:, :2])
        flows = [self.basic_module[0](torch.cat((reference, other, flow), 1))]
        for level, (reference, other) in zip(self.basic_module[1:], pyramid[1:]):
            flow = F.interpolate(flows[-1], scale_factor=2, mode="bilinear", align_corners=True) * 2
            # Once weights are no numbers, the flow itself says so, and with it the loss; there is only no place to read from.
            flows.append(level(torch.cat((reference, warp(other, flow.nan_to_num(), "border"), flow), 1)) + flow)
        return flows


def _rescale(flow: Tensor, height: int, width: int) -> Tensor:
    """(N, 2, h, w) -> (N, 2, H, W), the vectors stretched with the image."""
    x, y = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False).unbind(1)
    return torch.stack((x * (width / flow.shape[-1]), y * (height / flow.shape[-2])), dim=1)
