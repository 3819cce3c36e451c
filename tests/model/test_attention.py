"""Attention in windows, against its definition."""

import pytest
import torch
from torch import Tensor

from vrt.model import attention
from vrt.model.attention import SEPARATION, BiasedAttention, WindowAttention
from vrt.model.windows import sine_encoding


def by_definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    if regions is not None:
        mask = SEPARATION * (regions[:, None] != regions[..., None]).to(q.dtype)
        scores = scores + mask.repeat(q.shape[0] // mask.shape[0], 1, 1).unsqueeze(1)
    return scores.softmax(-1) @ v


@pytest.fixture(params=[1, 2**20], ids=["window by window", "all windows at once"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_CPU", request.param)


@pytest.mark.parametrize("shifted", [False, True])
def test_biased_attention_has_the_values_and_gradients_of_its_definition(shifted: bool, chunk: None) -> None:
    torch.manual_seed(0)
    # Two clips of three windows, two heads, in the memory order that the linear layer gives.
    q, k, v = torch.randn(6, 10, 3, 2, 4, dtype=torch.float64, requires_grad=True).permute(2, 0, 3, 1, 4).unbind(0)
    bias = torch.randn(2, 10, 10, dtype=torch.float64, requires_grad=True)
    regions = torch.randint(0, 2, (3, 10), dtype=torch.int16) if shifted else None
    found, expected = BiasedAttention.apply(q, k, v, bias, regions), by_definition(q, k, v, bias, regions)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, (q, k, v, bias), weight), torch.autograd.grad(expected, (q, k, v, bias), weight)):
        torch.testing.assert_close(a, b)


def test_mutual_attention_puts_each_result_where_its_keys_and_values_come_from() -> None:
    module = WindowAttention(8, (2, 2, 2), heads=2, qkv_bias=True, mutual=True).double()
    x = torch.rand(3, 8, 8, dtype=torch.float64)
    encoded = x + sine_encoding(2, 2, 8).double().repeat(1, 2, 1)
    q, k, v = module.qkv_mut(encoded).view(3, 8, 3, 2, 4).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(1, dtype=torch.float64)
    first = by_definition(q[:, :, 4:], k[:, :, :4], v[:, :, :4], bias, None)
    second = by_definition(q[:, :, :4], k[:, :, 4:], v[:, :, 4:], bias, None)
    expected = torch.cat((first, second), dim=2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module._attend_mutually(x, (2, 2, 2), None), expected)


@pytest.mark.parametrize("window", [(2, 3, 4), (2, 4, 1), (2, 1, 2)])
def test_a_shrunk_mutual_window_uses_the_encoding_of_its_own_size(window: tuple[int, int, int]) -> None:
    full, shrunk = (WindowAttention(8, size, heads=2, qkv_bias=True, mutual=True) for size in ((2, 4, 4), window))
    shrunk.qkv_mut.load_state_dict(full.qkv_mut.state_dict())
    x = torch.rand(2, window[0] * window[1] * window[2], 8)
    assert torch.equal(full._attend_mutually(x, window, None), shrunk._attend_mutually(x, window, None))


def test_a_shrunk_window_takes_the_first_rows_of_the_bias_index() -> None:
    module = WindowAttention(8, (2, 4, 4), heads=2, qkv_bias=True, mutual=False)
    index = module.relative_position_index[:6, :6]
    assert torch.equal(module._position_bias(6), module.relative_position_bias_table[index].permute(2, 0, 1))


def test_no_scores_are_kept_for_the_backward_pass() -> None:
    module = WindowAttention(8, (2, 8, 8), heads=2, qkv_bias=True, mutual=False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(torch.rand(16, 128, 8), (2, 8, 8), None)
    assert max(kept) < 16 * 2 * 128 * 128
