"""Deformable convolution against torchvision's numbers, and the alignment built on it."""

from collections.abc import Callable

import pytest
import torch

import vrt.model.deformable
from vrt.model.deformable import ParallelAlignment, deform_conv2d
from vrt.model.network import VRT

# Cases 5 and 6 have strides and dilations, which the network does not use. 8 and 9 sample at whole pixels, where offsets have no gradient.
SMOOTH, KINKED = [0, 1, 2, 3, 4, 7], [8, 9]


@pytest.mark.parametrize("case", SMOOTH + KINKED)
@pytest.mark.parametrize(("dtype", "key", "tolerance"), [(torch.float32, "out", 1e-5), (torch.float64, "out64", 1e-12)])
def test_deformable_convolution_gives_the_published_values(case: int, dtype: torch.dtype, key: str, tolerance: float, numbers: Callable) -> None:
    known = numbers("dcnv2")["cases"][case]
    x, offset, mask, weight = (known[name].to(dtype) for name in ("x", "offset", "mask", "weight"))
    bias = known["bias"].to(dtype) if "bias" in known else None
    torch.testing.assert_close(deform_conv2d(x, offset, mask, weight, bias, known["groups"]), known[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", SMOOTH)
def test_deformable_convolution_gives_the_published_gradients(case: int, numbers: Callable) -> None:
    known = numbers("dcnv2")["cases"][case]
    names = [name for name in ("x", "offset", "mask", "weight", "bias") if name in known]
    inputs = {name: known[name].double().requires_grad_() for name in names}
    out = deform_conv2d(*(inputs.get(name) for name in ("x", "offset", "mask", "weight", "bias")), known["groups"])
    gradients = torch.autograd.grad(out, list(inputs.values()), known["grad_out"].double())
    for name, gradient in zip(names, gradients):
        torch.testing.assert_close(gradient, known[f"grad64_{name}"], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_without_offsets_it_is_a_convolution() -> None:
    x, weight = torch.rand(2, 4, 5, 6, dtype=torch.float64), torch.rand(8, 4, 3, 3, dtype=torch.float64)
    found = deform_conv2d(x, x.new_zeros(2, 36, 5, 6), x.new_ones(2, 18, 5, 6), weight, None)
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, weight, padding=1))


def test_alignment_starts_at_the_plain_flow() -> None:
    module = ParallelAlignment(dim=4, reach=1, deformable_groups=2, max_offset=10.0).double()
    with torch.no_grad():
        # The middle tap copies its channel; the mask starts at a half.
        module.weight.zero_()[range(4), range(4), 1, 1] = 2.0
    x = torch.rand(1, 2, 6, 7, 4, dtype=torch.float64)
    right_by_one = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2, 1, 1).expand(2, 1, 1, 2, 6, 7)
    from_right, from_left = module(x, right_by_one)
    torch.testing.assert_close(from_right[:, 0, :, :-1], x[:, 1, :, 1:])
    torch.testing.assert_close(from_left[:, 1, :, :-1], x[:, 0, :, 1:])
    assert from_right[:, 1].eq(0).all() and from_left[:, 0].eq(0).all()


@pytest.mark.parametrize("reach", [2, 3])
def test_each_neighbour_is_moved_by_its_own_flow_and_weighed_in_its_own_place(reach: int) -> None:
    dim, depth, height, width = 2 * reach, reach + 2, 7, 8
    module = ParallelAlignment(dim, reach, deformable_groups=reach, max_offset=10.0).double()
    with torch.no_grad():
        # Two channels of the result for each neighbour: the middle tap copies its first two; the mask starts at a half.
        module.weight.zero_()[range(dim), [0, 1] * reach, 1, 1] = 2.0
    x = torch.rand(1, depth, height, width, dim, dtype=torch.float64)
    # (x, y) in whole pixels, another one for each direction, frame and neighbour.
    flows = torch.randint(-2, 3, (2, depth - 1, reach, 2), generator=torch.Generator().manual_seed(reach))
    spread = flows.double()[..., None, None].expand(-1, -1, -1, -1, height, width)
    aligned = module(x, spread)
    for way, clip, found in ((0, x, aligned[0]), (1, x.flip(1), aligned[1].flip(1))):
        expected = torch.zeros_like(clip)
        for frame in range(depth - 1):
            for place in range(min(reach, depth - 1 - frame)):
                moved = moved_by(clip[0, frame + 1 + place, :, :, :2], *flows[way, frame, place].tolist())
                expected[0, frame, :, :, 2 * place : 2 * place + 2] = moved
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_training_step_aligns_a_frame_twice_whether_blocks_are_checkpointed_or_not(
    use_checkpoint: bool, make_network: Callable[..., VRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned: list[int] = []
    monkeypatch.setattr(vrt.model.deformable, "deform_conv2d", lambda x, *rest, **named: aligned.append(len(x)) or deform_conv2d(x, *rest, **named))
    output = make_network(use_checkpoint=use_checkpoint).train()(torch.rand(1, 3, 3, 16, 16))
    # Two pairs of frames in both directions, in seven stages.
    assert sum(aligned) == 2 * 2 * 7
    output.sum().backward()
    assert sum(aligned) == 2 * (2 * 2 * 7)


def moved_by(x: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """(H, W, C) -> the same: at each pixel what lies so far to the right and below; zeros outside."""
    height, width, _ = x.shape
    far = torch.nn.functional.pad(x, (0, 0, 2, 2, 2, 2))
    return far[2 + down : 2 + down + height, 2 + right : 2 + right + width]
