"""The transformer block: attention in windows, then a gated MLP, both residual.

Axes: B clips, D frames, H height, W width, C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrt.model.attention import WindowAttention
from vrt.model.linear import Linear, runs_eagerly_on_cpu
from vrt.model.windows import Separation, Size, fit_window, merge, padded_size, partition, separate

CACHED_ROWS = 4096
"""Tokens whose hidden values fit a CPU's cache."""
KINDS_OF_BLOCK = 128
"""More than a network has: of scale, width, window and shift, in training, in validation, and for each size of a part of a batch."""


class GatedMlp(nn.Module):
    """fc2(gelu(fc11(x)) * fc12(x)) over the last axis (Shazeer, arXiv 2002.05202). (..., dim) -> (..., out)."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc11 = Linear(dim, hidden)
        self.fc12 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out), on a CPU a cacheful of tokens after another."""
        if not runs_eagerly_on_cpu(x):
            return self._gate(x)
        return torch.cat([self._gate(rows) for rows in x.flatten(0, -2).split(CACHED_ROWS)]).unflatten(0, x.shape[:-1])

    def _gate(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc11(x)) * self.fc12(x))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). With stochastic depth each sample skips either branch with probability `drop_path`.

    (B, D, H, W, C) -> (B, D, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        window: Size,
        shift: Size,
        heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        mutual: bool,
        drop_path: float,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.shift, self.mutual, self.drop_path = window, shift, mutual, drop_path
        self.place: tuple[int, int] | None = None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads, qkv_bias, mutual, keep)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> the same. In a direction in which `x` is no larger than a window, windows are of its size and not shifted."""
        size = tuple(x.shape[1:4])
        window, shift = self._fitting(size)
        separation = separate(padded_size(size, window), window, shift, x.device) if any(shift) else None
        return self.residual_branches(x, separation, self._draw(x), self._draw(x))

    def residual_branches(self, x: Tensor, separation: Separation | None, of_attention: Tensor | None, of_mlp: Tensor | None) -> Tensor:
        """The block, given what separates the tokens of shifted windows, and what `_draw` drew for either branch."""
        x = x + _times(self._attend(self.norm1(x), separation), of_attention)
        return x + _times(self.mlp(self.norm2(x)), of_mlp)

    def _attend(self, x: Tensor, separation: Separation | None) -> Tensor:
        size = tuple(x.shape[1:4])
        window, shift = self._fitting(size)
        tokens, padded = partition(x, window, shift)
        return merge(self.attn(tokens, window, separation), padded, size, window, shift)

    def _fitting(self, size: Size) -> tuple[Size, Size]:
        """The window and shift used on a map of `size`."""
        return fit_window(size, self.window, self.shift, least_depth=2 if self.mutual else 1)

    def _draw(self, x: Tensor) -> Tensor | None:
        """Stochastic depth (Huang et al., arXiv 1603.09382), drawn from the default generator of x's device: what to multiply a branch by,
        (B, 1, 1, 1, 1), or None where nothing is ever dropped.
        """
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        first, total = self.place or (0, x.shape[0])
        drawn = x.new_empty(total, 1, 1, 1, 1).bernoulli_(keep).div_(keep)
        return drawn[first : first + x.shape[0]]


def _times(branch: Tensor, factor: Tensor | None) -> Tensor:
    return branch if factor is None else branch * factor


def compile_blocks(network: nn.Module) -> None:
    """Let the compiler fuse what the blocks of `network` compute.

    Not the network as one piece: it has a hundred blocks but a score of kinds of them, and to compile each kind once takes a fraction of the time.
    """
    # The kinds differ in size, window, shift and width: more than the compiler's limit, beyond which it would silently give up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS_OF_BLOCK)
    for module in network.modules():
        if isinstance(module, Block):
            module.residual_branches = torch.compile(module.residual_branches, dynamic=False)


def place_in_batch(network: nn.Module, first: int, total: int) -> None:
    """Tell `network` that its next input is samples `first` and following of a batch of `total`.

    Stochastic depth then draws for the whole batch and takes its part, so that one process and many, all clips at once and a few after
    another drop the same branches of the same samples.
    """
    for module in network.modules():
        if isinstance(module, Block):
            module.place = (first, total)


class BlockGroup(nn.Module):
    """Blocks in a row, every second one with its windows shifted by half. (B, D, H, W, C) -> the same."""

    def __init__(
        self,
        dim: int,
        window: Size,
        heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        mutual: bool,
        drop_path: Sequence[float],
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        half = tuple(w // 2 for w in window)
        self.blocks = nn.ModuleList(
            [
                Block(dim, window, half if i % 2 else (0, 0, 0), heads, mlp_ratio, qkv_bias, mutual, rate, use_checkpoint)
                for i, rate in enumerate(drop_path)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> the same, with activation checkpointing of each block where `use_checkpoint` asks for it."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.use_checkpoint else block(x)
        return x
