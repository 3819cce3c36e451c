"""Computing in parts, and again for the gradient."""

import pytest
import torch
from torch import Tensor, nn

from vrt.model.recompute import in_parts


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_parts_have_the_values_and_gradients_of_the_whole(size: int, keep: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 5).double()
    x, y = (torch.randn(7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shared = torch.randn(4, dtype=torch.float64, requires_grad=True)
    offsets = torch.arange(7.0, dtype=torch.float64).unsqueeze(1)

    def run(part: slice, x: Tensor, y: Tensor, shared: Tensor) -> Tensor:
        return layer(x * y.exp() * shared + offsets[part]).tanh()

    sources = [x, y, shared, *layer.parameters()]
    found, expected = in_parts(run, size, (x, y), layer.parameters(), (shared,), keep), run(slice(None), x, y, shared)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), sources), torch.autograd.grad(expected.square().sum(), sources)):
        torch.testing.assert_close(a, b)


def test_what_wants_no_gradient_gets_none() -> None:
    # As flow and alignment in the first steps of a training.
    layer = nn.Linear(4, 5)
    layer.weight.requires_grad_(False)
    x, y = torch.randn(7, 4), torch.randn(7, 4, requires_grad=True)
    in_parts(lambda _, x, y: layer(x * y), 3, (x, y), layer.parameters()).sum().backward()
    assert x.grad is None and layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((5,), 7.0))
    torch.testing.assert_close(y.grad, x * layer.weight.sum(0))
