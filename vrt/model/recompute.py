"""Compute in parts that fit the cache, keep nothing but the input, and compute each part again for its gradient.

On a CPU this takes no longer than to write all intermediate results to memory and read them back, and it needs a fraction of the memory.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

Run = Callable[..., Tensor]
"""(which rows, those rows of each input, the shared tensors) -> those rows of the result."""


def in_parts(
    run: Run, size: int, inputs: Sequence[Tensor], parameters: Iterable[nn.Parameter], shared: Sequence[Tensor] = (), keep: bool = False
) -> Tensor:
    """`run` on all rows of `inputs`, `size` rows at a time; gradients reach inputs, `parameters` (those that `run` uses) and `shared`.

    inputs: each (N, ...). Returns (N, ...). `run` must compute a row from that row alone, and draw no random numbers.
    With `keep` intermediate results stay until the backward pass: right where all of this is itself computed again just before it.
    """
    if torch.is_grad_enabled() and not keep:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return _InParts.apply(run, size, len(inputs), len(shared), *inputs, *shared, *trained)
    rows = zip(*(tensor.split(size) for tensor in inputs))
    return torch.cat([run(part, *own, *shared) for part, own in zip(_parts(inputs[0], size), rows)])


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, run: Run, size: int, n_inputs: int, n_shared: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.size, ctx.counts = run, size, (n_inputs, n_shared)
        ctx.save_for_backward(*tensors)
        inputs, shared, _ = _split([tensor.detach() for tensor in tensors], ctx.counts)
        outputs = []
        for part in _parts(inputs[0], size):
            # As in the backward pass, since `run` may choose faster ways where no gradient is wanted, which round differently.
            with torch.enable_grad():
                outputs.append(run(part, *(tensor[part] for tensor in inputs), *shared).detach())
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, shared, trained = _split(ctx.saved_tensors, ctx.counts)
        wanted = ctx.needs_input_grad[4:]
        leaves = [_leaf(tensor) for tensor in shared]
        d_inputs = [torch.empty_like(tensor) if want else None for tensor, want in zip(inputs, wanted)]
        totals: list[Tensor] = []
        # From the last to the first, as autograd goes through parts that were kept: sums of gradients then have the same bits.
        for part in reversed(list(_parts(inputs[0], ctx.size))):
            rows = [_leaf(tensor, part) for tensor in inputs]
            sources = [source for source in (*rows, *leaves, *trained) if source.requires_grad]
            with torch.enable_grad():
                out = ctx.run(part, *rows, *leaves)
            grads = list(torch.autograd.grad(out, sources, grad[part]))
            for d_input in d_inputs:
                if d_input is not None:
                    d_input[part] = grads.pop(0)
            totals = [total.add_(d_source) for total, d_source in zip(totals, grads)] if totals else grads
        by_source = iter(totals)
        return None, None, None, None, *d_inputs, *(next(by_source) if want else None for want in wanted[len(inputs) :])


def _split(tensors: Sequence[Tensor], counts: tuple[int, int]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """What `in_parts` was given: (inputs, shared, parameters)."""
    n_inputs, n_shared = counts
    return tensors[:n_inputs], tensors[n_inputs : n_inputs + n_shared], tensors[n_inputs + n_shared :]


def _leaf(tensor: Tensor, part: slice = slice(None)) -> Tensor:
    """Rows of a tensor, without their past."""
    return tensor[part].detach().requires_grad_(tensor.requires_grad)


def _parts(tensor: Tensor, size: int) -> Iterable[slice]:
    return (slice(start, start + size) for start in range(0, tensor.shape[0], size))
