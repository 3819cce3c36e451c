"""The stages of the network: a change of scale, blocks of attention, the alignment of neighbours.

Axes: B clips, D frames, H height, W width, C channels; R reach, the neighbours on one side of a frame.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrt.model.block import BlockGroup, GatedMlp
from vrt.model.deformable import ParallelAlignment
from vrt.model.linear import Linear
from vrt.model.windows import Size


def unchanged(x: Tensor) -> Tensor:
    """(B, D, H, W, C) -> the same: the rearrangement of a stage that keeps the scale."""
    return x


def space_to_depth(x: Tensor) -> Tensor:
    """(B, D, H, W, C) -> (B, D, H/2, W/2, 4C); channels in the order (w offset, h offset, c)."""
    b, d, h, w, c = x.shape
    return x.reshape(b, d, h // 2, 2, w // 2, 2, c).permute(0, 1, 2, 4, 5, 3, 6).reshape(b, d, h // 2, w // 2, 4 * c)


def depth_to_space(x: Tensor) -> Tensor:
    """Undo `space_to_depth`: (B, D, H, W, C) -> (B, D, 2H, 2W, C/4)."""
    b, d, h, w, c = x.shape
    return x.reshape(b, d, h, w, 2, 2, c // 4).permute(0, 1, 2, 5, 3, 4, 6).reshape(b, d, 2 * h, 2 * w, c // 4)


class Reshape(nn.Sequential):
    """Rearrange, LayerNorm, and a Linear where the number of channels changes. (B, D, H, W, C) -> (B, D, H', W', dim)."""

    def __init__(self, rearrange: Callable[[Tensor], Tensor], rearranged_dim: int, dim: int | None) -> None:
        # The names leave 0 to the rearrangement, which has no weights: the published keys count it.
        layers: list[tuple[str, nn.Module]] = [("1", nn.LayerNorm(rearranged_dim))]
        if dim is not None:
            layers.append(("2", Linear(rearranged_dim, dim)))
        super().__init__(OrderedDict(layers))
        self.rearrange = rearrange

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, D, H', W', dim)."""
        return super().forward(self.rearrange(x))


class Stage(nn.Module):
    """One stage of the U-shaped body.

    `reshape` brings the features to the stage's scale; then blocks with mutual and self attention on pairs of frames, blocks with
    self attention on the full window, and, where `alignment` is given, the fusion of every frame with its aligned neighbours.
    """

    def __init__(
        self,
        reshape: Reshape,
        dim: int,
        heads: int,
        window: Size,
        mutual_blocks: int,
        drop_path: Sequence[float],
        mlp_ratio: float,
        qkv_bias: bool,
        alignment: ParallelAlignment | None,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        shared = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "use_checkpoint": use_checkpoint}
        self.reshape = reshape
        self.residual_group1 = BlockGroup(dim, (2, *window[1:]), heads, mutual=True, drop_path=drop_path[:mutual_blocks], **shared)
        self.linear1 = Linear(dim, dim)
        # The second group starts at the stage's first rate again, as the published network does.
        rest = drop_path[: len(drop_path) - mutual_blocks]
        self.residual_group2 = BlockGroup(dim, window, heads, mutual=False, drop_path=rest, **shared)
        self.linear2 = Linear(dim, dim)
        if alignment is not None:
            self.pa_deform = alignment
            self.pa_fuse = GatedMlp(3 * dim, 3 * dim, dim)
        self.aligns = alignment is not None

    def forward(self, x: Tensor, flows: Tensor | None) -> Tensor:
        """x: (B, D, H, W, C); flows: (2B, D-1, R, 2, H', W') at this stage's scale, or None for a clip of one frame. Returns (B, D, H', W', dim)."""
        x = self.reshape(x)
        x = x + self.linear1(self.residual_group1(x))
        x = x + self.linear2(self.residual_group2(x))
        if not self.aligns:
            return x
        if self.use_checkpoint:
            return checkpoint(self._fuse_neighbours, x, flows, use_reentrant=False)
        return self._fuse_neighbours(x, flows)

    def _fuse_neighbours(self, x: Tensor, flows: Tensor | None) -> Tensor:
        if flows is None:
            from_right = from_left = torch.zeros_like(x)
        else:
            from_right, from_left = self.pa_deform(x, flows)
        return self.pa_fuse(torch.cat((x, from_right, from_left), dim=-1))


class ReconstructionGroup(nn.Module):
    """Blocks with self attention and a Linear, residual. (B, D, H, W, C) -> the same."""

    def __init__(
        self, dim: int, heads: int, window: Size, drop_path: Sequence[float], mlp_ratio: float, qkv_bias: bool, use_checkpoint: bool
    ) -> None:
        super().__init__()
        self.residual_group = BlockGroup(dim, window, heads, mlp_ratio, qkv_bias, False, drop_path, use_checkpoint)
        self.linear = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> the same."""
        return x + self.linear(self.residual_group(x))
