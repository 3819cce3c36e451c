"""Attention in windows, against its definition."""

import pytest
import torch
from torch import Tensor

from vrt.model import attention
from vrt.model.attention import KeptAttention, WindowAttention
from vrt.model.windows import Separation, separate, sine_encoding


def by_definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, apart: Tensor | None = None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    return (scores if apart is None else scores + apart).softmax(-1) @ v


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_kept_attention_has_the_values_and_gradients_of_its_definition(biased: bool, shifted: bool) -> None:
    torch.manual_seed(0)
    # Six windows, two heads, in the memory order that the linear layer gives.
    q, k, v = torch.randn(6, 10, 3, 2, 4, dtype=torch.float64, requires_grad=True).permute(2, 0, 3, 1, 4).unbind(0)
    bias = torch.randn(2, 10, 10, dtype=torch.float64, requires_grad=True) if biased else None
    apart = -100.0 * torch.randint(0, 2, (6, 1, 10, 10)).double() if shifted else None
    found = KeptAttention.apply(q, k, v, bias, apart)
    expected = by_definition(q, k, v, bias if biased else torch.zeros(1, dtype=torch.float64), apart)
    torch.testing.assert_close(found, expected)
    weight, sources = torch.randn_like(found), (q, k, v, bias) if biased else (q, k, v)
    for a, b in zip(torch.autograd.grad(found, sources, weight), torch.autograd.grad(expected, sources, weight)):
        torch.testing.assert_close(a, b)


def test_separated_tokens_weigh_nothing_rather_than_a_subnormal_number_and_nan_stays() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 4, requires_grad=True) for _ in range(3))
    apart = torch.zeros(2, 1, 6, 6)
    apart[..., :3] = -100.0
    *_, weights, _ = KeptAttention.apply(q, k, v, None, apart).grad_fn.saved_tensors
    assert (weights[..., :3] == 0).all()
    assert (weights[..., 3:] > 0).all()
    with torch.no_grad():
        q[0, 0, 0, 0] = torch.nan
    assert KeptAttention.apply(q, k, v, None, apart)[0, 0, 0].isnan().all()


def outcome(module: WindowAttention, x: Tensor, separation: Separation) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    out = module(x, (2, 4, 4), separation)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("mutual", [False, True])
def test_no_grouping_of_the_windows_changes_the_result(mutual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = WindowAttention(8, (2, 4, 4), heads=2, qkv_bias=True, mutual=mutual).double()
    separation = separate((2, 8, 8), (2, 4, 4), (0, 2, 2), torch.device("cpu"))
    # Two clips of four windows, one of which is not cut by the shift.
    x = torch.rand(8, 32, 8, dtype=torch.float64, requires_grad=True)
    together = outcome(module, x, separation)
    monkeypatch.setattr(attention, "runs_eagerly_on_cpu", lambda x: False)
    elsewhere = outcome(module, x, separation)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "CACHED_SCORES", 3 * 2 * 32**2)
    by_threes = outcome(module, x, separation)
    module.keep = True
    for other in (elsewhere, by_threes, outcome(module, x, separation)):
        for a, b in zip(together, other):
            torch.testing.assert_close(a, b)


def test_mutual_attention_puts_each_result_where_its_keys_and_values_come_from() -> None:
    module = WindowAttention(8, (2, 2, 2), heads=2, qkv_bias=True, mutual=True).double()
    x = torch.rand(3, 8, 8, dtype=torch.float64)
    encoded = x + sine_encoding(2, 2, 8).double().repeat(1, 2, 1)
    q, k, v = module.qkv_mut(encoded).view(3, 8, 3, 2, 4).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(1, dtype=torch.float64)
    first = by_definition(q[:, :, 4:], k[:, :, :4], v[:, :, :4], bias)
    second = by_definition(q[:, :, :4], k[:, :, 4:], v[:, :, 4:], bias)
    expected = torch.cat((first, second), dim=2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module._attend_mutually(x, module.position_bias, None), expected)


@pytest.mark.parametrize("window", [(2, 3, 4), (2, 4, 1), (2, 1, 2)])
def test_a_shrunk_mutual_window_uses_the_encoding_of_its_own_size(window: tuple[int, int, int]) -> None:
    full, shrunk = (WindowAttention(8, size, heads=2, qkv_bias=True, mutual=True) for size in ((2, 4, 4), window))
    shrunk.qkv_mut.load_state_dict(full.qkv_mut.state_dict())
    x = torch.rand(2, window[0] * window[1] * window[2], 8)
    assert torch.equal(full._attend_mutually(x, full._encoding(window), None), shrunk._attend_mutually(x, shrunk.position_bias, None))


def test_a_shrunk_window_takes_the_first_rows_of_the_bias_index() -> None:
    module = WindowAttention(8, (2, 4, 4), heads=2, qkv_bias=True, mutual=False)
    index = module.relative_position_index[:6, :6]
    assert torch.equal(module._position_bias(6), module.relative_position_bias_table[index].permute(2, 0, 1))


@pytest.mark.parametrize("keep", [False, True])
def test_scores_are_kept_for_the_backward_pass_only_where_wanted(keep: bool) -> None:
    module = WindowAttention(8, (2, 8, 8), heads=2, qkv_bias=True, mutual=False, keep=keep)
    nodes = {module(torch.rand(16, 128, 8), (2, 8, 8), None).grad_fn}
    seen = set()
    while nodes - seen:
        seen |= (new := nodes - seen)
        nodes |= {before for node in new for before, _ in node.next_functions if before is not None}
    kept = [tensor.numel() for node in seen for tensor in getattr(node, "saved_tensors", ()) if tensor is not None]
    assert (sum(kept) >= 16 * 2 * 128 * 128) == keep
