"""The linear layer, whichever library computes it."""

import pytest
import torch
import torch.nn.functional as F

from vrt.model.linear import Linear


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 4, 12), (12,), (0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_a_matrix_product(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(12, 8, bias=bias), torch.randn(shape, requires_grad=True)
    found, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected)
    sources = [x, *layer.parameters()]
    weight = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, sources, weight), torch.autograd.grad(expected, sources, weight)):
        torch.testing.assert_close(a, b)
