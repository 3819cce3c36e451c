"""Attention within windows: of all tokens of a window (self), and of each frame of a pair to the other (mutual).

Axes: B clips, M windows of a map, N tokens of a window in the order (d, h, w), C channels, A heads, E channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from vrt.model.linear import Linear, runs_eagerly_on_cpu
from vrt.model.recompute import in_parts
from vrt.model.windows import Separation, Size, relative_position_index, shrunk_sine_encoding, sine_encoding

CACHED_SCORES = 2**21
"""Scores computed at once on a CPU, so that they stay in its cache."""
BYTES_IN_STEP = 16
"""The channels of a head fill whole steps of so many bytes, or PyTorch's fused attention for GPUs refuses them."""


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with relative position bias; with `mutual`, also between the two frames of the window.

    On CPUs a training keeps no attention weights: each group of windows that fits the cache is computed again for its gradient. `keep` does
    without that, where the whole block is computed again anyway.
    """

    def __init__(self, dim: int, window: Size, heads: int, qkv_bias: bool, mutual: bool, keep: bool = False) -> None:
        super().__init__()
        self.heads, self.window, self.mutual, self.keep = heads, window, mutual, keep
        d, h, w = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * d - 1) * (2 * h - 1) * (2 * w - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))
        if mutual:
            self.register_buffer("position_bias", sine_encoding(h, w, dim))
        self.qkv_self = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(2 * dim if mutual else dim, dim)
        if mutual:
            self.qkv_mut = Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, window: Size, separation: Separation | None) -> Tensor:
        """x: (B * M, N, C), tokens of windows of size `window`, with the separation of shifted windows, or None where nothing was shifted.

        Returns (B * M, N, C).
        """
        windows, tokens, _ = x.shape
        encoding = self._encoding(window) if self.mutual else None

        def attend(part: slice, x: Tensor, bias: Tensor) -> Tensor:
            apart = None if separation is None else separation.scores(part, windows, tokens)
            attended = self._attend_self(x, bias, apart)
            if encoding is not None:
                attended = torch.cat((self._attend_mutually(x, encoding, apart), attended), dim=2)
            return self.proj(attended)

        bias = self._position_bias(tokens)
        if not runs_eagerly_on_cpu(x):
            return attend(slice(None), x, bias)
        layers = (self.qkv_self, self.qkv_mut, self.proj) if self.mutual else (self.qkv_self, self.proj)
        size = max(CACHED_SCORES // (self.heads * tokens**2), 1)
        return in_parts(attend, size, (x,), [parameter for layer in layers for parameter in layer.parameters()], (bias,), self.keep)

    def _attend_self(self, x: Tensor, bias: Tensor, apart: Tensor | None) -> Tensor:
        q, k, v = self._heads(self.qkv_self(x))
        return attention(q, k, v, bias, apart).transpose(1, 2).flatten(2)

    def _attend_mutually(self, x: Tensor, encoding: Tensor, apart: Tensor | None) -> Tensor:
        """Tokens of the first frame see where the second frame has them, and the reverse."""
        m, n, channels = x.shape
        pairs = (x.view(m, 2, n // 2, channels) + encoding.unsqueeze(1)).flatten(0, 1)
        q, k, v = self._heads(self.qkv_mut(pairs))
        # The queries of the other frame of the pair; the result takes the place of the frame that gave keys and values.
        q = q.unflatten(0, (m, 2)).flip(1).flatten(0, 1)
        if apart is not None:
            # Both frames are cut alike, so the first one's mask serves for both, as in the published network.
            apart = apart[:, :, : n // 2, : n // 2].repeat_interleave(2, dim=0)
        return attention(q, k, v, None, apart).transpose(1, 2).reshape(m, n, channels)

    def _encoding(self, window: Size) -> Tensor:
        """(1, h * w, C): where a token is in its frame of the window."""
        if window[1:] == self.window[1:]:
            return self.position_bias
        return shrunk_sine_encoding(*window[1:], self.position_bias.shape[-1], self.position_bias.dtype, self.position_bias.device)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, N, 3C) -> three of (M, A, N, E)."""
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _position_bias(self, tokens: int) -> Tensor:
        """(A, N, N). A shrunk window takes the top-left part of the full window's index, as the published network does."""
        index = self.relative_position_index[:tokens, :tokens].reshape(-1)
        return self.relative_position_bias_table.t().index_select(1, index).view(self.heads, tokens, tokens)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, apart: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(E) + bias + apart) v, by PyTorch's fused kernels where they win.

    q, k, v: (M, A, N, E); bias: (A, N, N) or None; apart: (M, 1, N, N) or None. Returns (M, A, N, E).
    """
    if torch.is_grad_enabled() and runs_eagerly_on_cpu(q):
        return KeptAttention.apply(q, k, v, bias, apart)
    # A bias that says it wants a gradient, as a view made before autograd was turned off may, would be refused by the fused kernels.
    if not torch.is_grad_enabled() and bias is not None:
        bias = bias.detach()
    added = [term.to(q.dtype) for term in (bias, apart) if term is not None]
    mask = sum(added[1:], added[0]).expand(q.shape[0], -1, -1, -1) if added else None
    channels = q.shape[-1]
    missing = -channels % (BYTES_IN_STEP // q.element_size()) if q.is_cuda else 0
    if missing:
        # Zeros change no product; without them PyTorch takes its plain way, which writes all scores and was two to three times as slow.
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=channels**-0.5)[..., :channels]


class KeptAttention(torch.autograd.Function):
    """Attention that keeps its weights for the backward pass: for as few windows at once as fit a CPU's cache.

    PyTorch's fused kernels give no gradient to the bias on CPUs, and its plain products are slow for the few channels of a head.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, apart: Tensor | None) -> Tensor:
        """Shapes as in `attention`. Returns (M, A, N, E)."""
        ctx.scale = q.shape[-1] ** -0.5
        scaled, k, v = q * ctx.scale, k.contiguous(), v.contiguous()
        scores = scaled @ k.mT
        for term in (bias, apart):
            if term is not None:
                scores += term
        weights = scores.softmax(3)
        if apart is not None:
            # What is left of a separated token's weight is a subnormal number in float32: on some CPUs products with those take fifty times as long.
            F.threshold_(weights, torch.finfo(weights.dtype).tiny, 0.0)
        out = (v.mT @ weights.mT).mT
        ctx.save_for_backward(scaled, k, v, weights, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        """grad: (M, A, N, E). Returns the gradients of q, k, v and, where it wants one, the bias."""
        scaled, k, v, weights, out = ctx.saved_tensors
        grad = grad.contiguous()
        # The gradient of a softmax is w * (d - sum(w * d)), and sum(w * d) over the keys equals sum(out * d_out) over the channels.
        d_scores = (grad @ v.mT).sub_((out * grad).sum(3, keepdim=True)).mul_(weights)
        # A head has few channels: as rows, not columns, of the left matrix these products take a third of the time on CPUs.
        d_q = (k.mT @ d_scores.mT).mul_(ctx.scale).mT
        d_k = (scaled.mT @ d_scores).mT
        d_v = (grad.mT @ weights).mT
        return d_q, d_k, d_v, d_scores.sum(0) if ctx.needs_input_grad[3] else None, None
