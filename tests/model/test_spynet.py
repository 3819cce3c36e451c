"""Optical flow."""

from collections.abc import Callable

import pytest
import torch

from vrt.model.spynet import SpyNet


def test_flows_are_the_published_ones_in_both_directions(published: Callable) -> None:
    case = published("sr_pa2")
    with torch.inference_mode():
        flows = case.network(torch.float32).flows(case.numbers["input"])
    for scale, flow in enumerate(flows):
        backward, forward = flow[:, :, 0].chunk(2)
        torch.testing.assert_close(backward, case.numbers["flows_backward"][scale], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(forward.flip(1), case.numbers["flows_forward"][scale], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sr_pa2", "sr_pa6_d9"])
def test_flows_have_the_published_digests(name: str, published: Callable) -> None:
    numbers = published(name).numbers
    with torch.inference_mode():
        flows = published(name).network(torch.float32).flows(numbers["input"])
    for scale, flow in enumerate(flows):
        for found, expected in zip(flow[:, :, 0].chunk(2), (numbers["flows_digest"][way][scale] for way in ("backward", "forward"))):
            assert list(found.shape) == expected["shape"]
            assert found.double().norm().item() == pytest.approx(expected["l2"], rel=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (40, 72)])
def test_any_size_has_flows_at_four_scales(size: tuple[int, int]) -> None:
    flows = SpyNet()(torch.rand(2, 3, 3, *size))
    assert [tuple(flow.shape) for flow in flows] == [(2, 2, 2, size[0] // s, size[1] // s) for s in (1, 2, 4, 8)]


def test_flow_stays_float32_under_autocast() -> None:
    spynet, clip = SpyNet(), torch.rand(1, 2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flows = spynet(clip)
    for found, expected in zip(flows, spynet(clip)):
        assert torch.equal(found, expected)
