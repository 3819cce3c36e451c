"""Attention within windows: of all tokens of a window (self), and of each frame of a pair to the other (mutual).

Axes: B clips, M windows of a map, N tokens of a window in the order (d, h, w), C channels, A heads, E channels of a head.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from vrt.model.windows import Size, relative_position_index, shrunk_sine_encoding, sine_encoding

SEPARATION = -100.0
"""Added to the score of two tokens that must not see one another, as in the published network."""
CHUNK_CPU = 2**20
"""Scores computed at once; on a CPU they then stay in its cache, which makes the backward pass half as long."""
CHUNK_GPU = 2**27


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with relative position bias; with `mutual`, also between the two frames of the window."""

    def __init__(self, dim: int, window: Size, heads: int, qkv_bias: bool, mutual: bool) -> None:
        super().__init__()
        self.heads, self.window, self.mutual = heads, window, mutual
        d, h, w = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * d - 1) * (2 * h - 1) * (2 * w - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))
        if mutual:
            self.register_buffer("position_bias", sine_encoding(h, w, dim))
        self.qkv_self = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(2 * dim if mutual else dim, dim)
        if mutual:
            self.qkv_mut = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, window: Size, regions: Tensor | None) -> Tensor:
        """x: (B * M, N, C), tokens of windows of size `window`; regions: (M, N), as `shift_regions` gives them, or None where nothing was shifted.

        Returns (B * M, N, C).
        """
        attended = self._attend_self(x, regions)
        if self.mutual:
            attended = torch.cat((self._attend_mutually(x, window, regions), attended), dim=2)
        return self.proj(attended)

    def _attend_self(self, x: Tensor, regions: Tensor | None) -> Tensor:
        q, k, v = self._heads(self.qkv_self(x))
        return BiasedAttention.apply(q, k, v, self._position_bias(x.shape[1]).to(q.dtype), regions).transpose(1, 2).flatten(2)

    def _attend_mutually(self, x: Tensor, window: Size, regions: Tensor | None) -> Tensor:
        """Tokens of the first frame see where the second frame has them, and the reverse."""
        m, n, channels = x.shape
        encoding = self.position_bias
        if window[1:] != self.window[1:]:
            encoding = shrunk_sine_encoding(*window[1:], channels, encoding.dtype, encoding.device)
        pairs = (x.view(m, 2, n // 2, channels) + encoding.unsqueeze(1)).flatten(0, 1)
        q, k, v = self._heads(self.qkv_mut(pairs))
        # The queries of the other frame of the pair; the result takes the place of the frame that gave keys and values.
        q = q.unflatten(0, (m, 2)).flip(1).flatten(0, 1)
        mask = None
        if regions is not None:
            # Both frames are cut alike, so the first one's regions serve for both, as in the published network.
            frames = regions[:, : n // 2].repeat_interleave(2, dim=0)
            mask = _separate(frames, q.dtype).repeat(m // regions.shape[0], 1, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(m, n, channels)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, N, 3C) -> three of (M, A, N, E)."""
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _position_bias(self, tokens: int) -> Tensor:
        """(A, N, N). A shrunk window takes the top-left part of the full window's index, as the published network does."""
        index = self.relative_position_index[:tokens, :tokens].reshape(-1)
        return self.relative_position_bias_table.t().index_select(1, index).view(self.heads, tokens, tokens)


class BiasedAttention(torch.autograd.Function):
    """Scaled dot-product attention with a bias that is trained, without ever holding the scores of all windows.

    PyTorch's fused kernels give no gradient to the bias on CPUs: they fall back to holding all scores, A * N * N per window. Here the
    forward pass keeps only its inputs and output, and the backward pass computes the scores again, as many windows at a time as fit the cache.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None) -> Tensor:
        """q, k, v: (B * M, A, N, E); bias: (A, N, N); regions: (M, N) or None. Returns (B * M, A, N, E)."""
        # Autograd is off in here, but a bias that says it wants a gradient would still be refused by the fused kernels.
        fixed = bias.detach()
        if regions is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=fixed.unsqueeze(0))
        else:
            # Tokens before heads in memory, as the projection that follows reads them.
            out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for part in _chunks(q):
                out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=_masked(fixed, regions, part))
        ctx.save_for_backward(q, k, v, bias, regions, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, bias, regions, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        # One tensor in the order of the linear layer's output (tokens, qkv, heads), so that its own backward pass needs no copy.
        m, heads, n, channels = q.shape
        d_q, d_k, d_v = q.new_empty(m, n, 3, heads, channels).permute(2, 0, 3, 1, 4).unbind(0)
        d_bias = torch.zeros_like(bias)
        for part in _chunks(q):
            scaled, d_out = q[part] * scale, grad[part]
            weights = (scaled @ k[part].mT).add_(_masked(bias, regions, part)).softmax(3)
            # The gradient of a softmax is w * (d - sum(w * d)), and sum(w * d) over the keys equals sum(out * d_out) over the channels.
            d_scores = (d_out @ v[part].mT).sub_((out[part] * d_out).sum(3, keepdim=True)).mul_(weights)
            d_bias += d_scores.sum(0)
            # A head has few channels: as rows, not columns, of the left matrix these products take a third of the time on CPUs.
            d_q[part] = (k[part].mT @ d_scores.mT).mul_(scale).mT
            d_k[part] = (scaled.mT @ d_scores).mT
            d_v[part] = (d_out.mT @ weights).mT
        return d_q, d_k, d_v, d_bias, None


def _chunks(q: Tensor) -> Iterator[slice]:
    """Slices of the windows of q, (B * M, A, N, E), whose scores are computed at once."""
    windows, heads, tokens, _ = q.shape
    size = max((CHUNK_CPU if q.device.type == "cpu" else CHUNK_GPU) // (heads * tokens**2), 1)
    return (slice(start, min(start + size, windows)) for start in range(0, windows, size))


def _masked(bias: Tensor, regions: Tensor | None, part: slice) -> Tensor:
    """(1 or windows in part, A, N, N): the bias, and the separation of shifted windows."""
    if regions is None:
        return bias.unsqueeze(0)
    # The windows of all clips follow one another and share their regions.
    own = torch.arange(part.start, part.stop, device=bias.device) % regions.shape[0]
    return bias + _separate(regions[own], bias.dtype)


def _separate(regions: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, N) -> (M, 1, N, N): SEPARATION between tokens of different regions, else 0."""
    differ = regions.unsqueeze(1) != regions.unsqueeze(2)
    return torch.zeros(differ.shape, dtype=dtype, device=regions.device).masked_fill_(differ, SEPARATION).unsqueeze(1)
