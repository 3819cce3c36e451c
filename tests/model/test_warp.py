"""Warping, gathering and composing by flows."""

from collections.abc import Callable

import pytest
import torch

import vrt.model.warp
from vrt.model.warp import back_in_time, both_ways, extend_reach, gather_nearest4, pad_frames, sample, sample_in_order, warp


@pytest.mark.parametrize("case", [0, 1])
def test_bilinear_warp_gives_the_published_values(case: int, numbers: Callable) -> None:
    known = numbers("flow_warp")[case]
    found = warp(known["x"], known["flow"].permute(0, 3, 1, 2), known["padding_mode"])
    torch.testing.assert_close(found, known["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_sampling_in_order_has_the_values_and_gradients_of_pytorchs_own(padding_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Less than all points at once, as in a training.
    monkeypatch.setattr(vrt.model.warp, "POINTS_AT_ONCE", 7)
    torch.manual_seed(0)
    x = torch.rand(3, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    # Some points lie far outside.
    at_x, at_y = (torch.cat((torch.rand(3, 6, 4, dtype=torch.float64) * 14 - 3, torch.full((3, 6, 1), place)), 2) for place in (-50.0, 100.0))
    sources = (x, at_x.requires_grad_(), at_y.requires_grad_())
    found, expected = sample_in_order(*sources, padding_mode), sample(*sources, padding_mode)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, sources, weight), torch.autograd.grad(expected, sources, weight)):
        torch.testing.assert_close(a, b)


def test_nearest4_gathers_the_published_pixels_without_mixing(numbers: Callable) -> None:
    known = numbers("flow_warp")[2]
    assert torch.equal(gather_nearest4(known["x"], known["flow"].permute(0, 3, 1, 2)), known["out"])


def test_nearest4_reads_zero_outside_however_far_the_flow_leads() -> None:
    x, flow = torch.ones(1, 1, 4, 5), torch.tensor([1e6, -1e6]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    assert gather_nearest4(x, flow).eq(0).all()


NAN = float("nan")


@pytest.mark.parametrize("sampling", [sample, sample_in_order])
def test_a_point_that_is_no_number_gives_a_value_that_is_none_and_ends_no_process(sampling: Callable) -> None:
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    at_x, at_y = torch.rand(2, 16, 16) * 15, torch.rand(2, 16, 16) * 15
    at_x[0, 3, 5] = at_y[1, 0, 0] = NAN
    found = sampling(x, at_x.requires_grad_(), at_y.requires_grad_(), "zeros")
    assert found.isnan().nonzero().tolist() == [[n, c, y, x] for n, y, x in ((0, 3, 5), (1, 0, 0)) for c in range(3)]
    found.sum().backward()
    assert at_x.grad[0, 3, 5].isnan() or at_y.grad[0, 3, 5].isnan()


def test_nearest4_has_a_place_for_flows_that_are_no_numbers() -> None:
    flow = torch.zeros(1, 2, 4, 5)
    flow[0, 0, 1, 2] = flow[0, 1, 3, 3] = NAN
    gathered = gather_nearest4(torch.ones(1, 1, 4, 5), flow)
    assert gathered.eq(0).all(1).nonzero().tolist() == [[0, 1, 2], [0, 3, 3]]
    assert gathered.sum() == 4 * (4 * 5 - 2)


def test_a_whole_pixel_flow_moves_the_image_even_where_it_is_one_pixel_wide() -> None:
    x = torch.arange(4.0).view(1, 1, 4, 1)
    down = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 1)
    assert warp(x, down).flatten().tolist() == [1, 2, 3, 0]
    assert warp(x, down, "border").flatten().tolist() == [1, 2, 3, 3]
    assert warp(x, down.flip(1)).eq(0).all()


def test_flows_further_ahead_add_up_along_the_way() -> None:
    steps = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 9, 9)
    ahead = extend_reach(steps, 3)
    # At the centre, since what is read from outside the frame is 0.
    assert ahead[0, :, :, 0, 0, 0].tolist() == [[1, 3, 7], [2, 6, 0], [4, 0, 0]]


def test_a_flow_further_ahead_is_read_where_the_first_one_leads() -> None:
    first = torch.zeros(1, 1, 2, 1, 4)
    first[0, 0, 0, 0] = torch.tensor([2.0, 0.0, 0.0, 0.0])
    second = torch.zeros(1, 1, 2, 1, 4)
    second[0, 0, 0, 0] = torch.tensor([0.0, 0.0, 5.0, 0.0])
    ahead = extend_reach(torch.cat((first, second), dim=1), 2)
    assert ahead[0, 0, 1, 0, 0].tolist() == [7, 0, 5, 0]


def test_clips_played_both_ways_come_back_in_order() -> None:
    clips = torch.rand(2, 3, 1, 2, 2)
    forward, backward = back_in_time(both_ways(clips))
    assert torch.equal(forward, clips) and torch.equal(backward, clips)


def test_missing_frames_become_zeros() -> None:
    padded = pad_frames(torch.ones(1, 2, 1), 4)
    assert padded.flatten().tolist() == [1, 1, 0, 0]
