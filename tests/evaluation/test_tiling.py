"""Tiles change the memory that a restoration takes, not its result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vrt.evaluation import tiling
from vrt.evaluation.tiling import AnySize, Tiling, TooLittleMemory, blend_weights, restore, tile_count, tile_spans
from vrt.model.precision import computing
from vrt.training.determinism import determinism


@st.composite
def axes(draw, longest: int = 40):
    """Length of an axis, its tile and its overlap."""
    tile = draw(st.integers(1, 12))
    return draw(st.integers(1, longest)), tile, draw(st.integers(0, tile - 1))


@st.composite
def tilings(draw):
    """Size of a clip, tile and overlap, as (frames, height, width) each."""
    return tuple(zip(draw(axes(longest=12)), draw(axes(longest=30)), draw(axes(longest=30))))


class Recorder(nn.Module):
    """Passes everything through and keeps the shapes it saw and the mode it was in."""

    def __init__(self):
        super().__init__()
        self.part = nn.Dropout(0.5)
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape[-4:]))
        self.modes.append((self.training, self.part.training))
        return x[:, :, :3]


class Blur(nn.Module):
    """Mean over 3 frames and 3 x 3 pixels, zeros outside: sees one place in every direction."""

    REACH = 1

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.full((3, 1, 3, 3, 3), 1 / 27)
        return nn.functional.conv3d(x.transpose(1, 2), weight, padding=1, groups=3).transpose(1, 2)


def clip(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


@given(axis=axes())
def test_spans_cover_the_axis_in_whole_tiles_that_share_the_overlap(axis):
    length, tile, overlap = axis
    spans = tile_spans(*axis)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(stop - start == min(tile, length) for start, stop in spans)
    assert all(earlier[1] - later[0] >= overlap for earlier, later in zip(spans, spans[1:]))
    assert all(earlier[0] < later[0] for earlier, later in zip(spans, spans[1:]))
    assert not length > tile or len(spans) == -(-(length - overlap) // (tile - overlap)), "no tile more than needed"


@given(axis=axes(), scale=st.sampled_from([1, 4]))
@settings(deadline=None)
def test_weights_are_positive_and_sum_to_one(axis, scale):
    length, _, overlap = axis
    spans = tile_spans(*axis)
    total = torch.zeros(length * scale)
    for (start, stop), weight in zip(spans, blend_weights(spans, overlap * scale, scale)):
        assert (weight > 0).all()
        total[start * scale : stop * scale] += weight
    torch.testing.assert_close(total, torch.ones(length * scale))


def test_weights_rise_linearly_over_the_overlap():
    first, second = blend_weights([(0, 10), (6, 16)], ramp=4, scale=1)
    torch.testing.assert_close(second, torch.tensor([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]))
    torch.testing.assert_close(first, second.flip(0))


def test_the_weights_of_an_output_rise_over_its_own_pixels():
    first, second = blend_weights([(0, 4), (2, 6)], ramp=8, scale=4)
    torch.testing.assert_close(second[:8], torch.arange(1, 9) / 9)
    torch.testing.assert_close(first, second.flip(0))


def test_the_ends_of_the_clip_are_no_cuts():
    """A last tile that was moved far inwards starts badly informed where the first one is well informed."""
    first, last = blend_weights([(0, 16), (1, 17)], ramp=4, scale=1)
    torch.testing.assert_close(last[:5], torch.tensor([1, 2, 3, 4, 5]) / torch.tensor([6, 7, 8, 9, 10]))
    torch.testing.assert_close(first, last.flip(0))


def test_tiles_that_disagree_leave_no_seam():
    """One tile returns 0, the next 1: the result climbs in equal steps over all of the overlap, not in one jump."""

    class OnePerTile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, :, :, :1].expand_as(x).ceil()

    ramp_from_zero = torch.linspace(0, 1, 28).expand(1, 2, 3, 4, 28)
    restored = restore(OnePerTile(), ramp_from_zero, (2, 4, 18), (0, 0, 8), 1)
    steps = restored[0, 0, 0, 0].diff()
    torch.testing.assert_close(steps[9:18], torch.full((9,), 1 / 9))
    assert (steps[:9] == 0).all() and (steps[18:].abs() < 1e-6).all()


def test_enlarged_tiles_that_disagree_leave_no_seam():
    class OnePerTile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, :, :1, :1].ceil().repeat(1, 1, 1, 4 * x.shape[-2], 4 * x.shape[-1])

    ramp_from_zero = torch.linspace(0, 1, 10).view(10, 1).expand(1, 2, 3, 10, 4)
    steps = restore(OnePerTile(), ramp_from_zero, (2, 6, 4), (0, 2, 0), 4)[0, 0, 0, :, 0].diff()
    torch.testing.assert_close(steps[15:24], torch.full((9,), 1 / 9))


@given(tiling=tilings())
@settings(deadline=None, max_examples=40)
def test_a_network_of_single_pixels_gives_the_whole_clip(tiling):
    size, tile, overlap = tiling
    degraded = clip(2, size[0], 3, *size[1:])
    network = nn.Hardtanh(0.2, 0.8)
    torch.testing.assert_close(restore(network, degraded, tile, overlap, 1), network(degraded), rtol=0, atol=5e-6)


@given(tiling=tilings())
@settings(deadline=None, max_examples=20)
def test_a_network_that_enlarges_gives_the_whole_clip(tiling):
    size, tile, overlap = tiling
    degraded = clip(1, size[0], 3, *size[1:])
    network = nn.Upsample(scale_factor=(1, 4, 4))
    channels_first = nn.Sequential(Swap(), network, Swap())
    torch.testing.assert_close(restore(channels_first, degraded, tile, overlap, 4), channels_first(degraded), rtol=0, atol=5e-6)


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@given(tiling=tilings())
@settings(deadline=None, max_examples=40)
def test_a_network_with_a_small_reach_gives_the_whole_clip_away_from_cuts(tiling):
    size, tile, overlap = tiling
    degraded = clip(1, size[0], 3, *size[1:])
    reached = [torch.ones(length, dtype=torch.bool) for length in size]
    for near, *axis in zip(reached, size, tile, overlap):
        for start, stop in tile_spans(*axis):
            near[start : start + Blur.REACH] &= start == 0
            near[stop - Blur.REACH : stop] &= stop == axis[0]
    same = reached[0].view(-1, 1, 1, 1) & reached[1].view(-1, 1) & reached[2]
    difference = (restore(Blur(), degraded, tile, overlap, 1) - Blur()(degraded)).abs()
    assert (difference[:, same.expand_as(difference[0])] < 5e-6).all()


def test_a_clip_in_one_tile_is_one_call_with_the_very_same_bits():
    network = Recorder()
    degraded = clip(1, 5, 4, 20, 30) - 0.5
    restored = restore(network, degraded, (5, 20, 40), (2, 8, 8), 1)
    assert network.shapes == [(5, 4, 20, 30)]
    assert torch.equal(restored, degraded[:, :, :3])


def test_the_network_never_sees_more_or_less_than_a_tile():
    network = Recorder()
    restore(network, clip(1, 11, 4, 20, 50), (4, 16, 64), (1, 4, 8), 1)
    assert set(network.shapes) == {(4, 4, 16, 50)}
    assert len(network.shapes) == tile_count((11, 20, 50), (4, 16, 64), (1, 4, 8)) == 4 * 2


@pytest.mark.parametrize("first", [0, 1, 5, 6, 10])
def test_a_stream_reads_each_tile_once_in_order_and_gives_the_same_bits_wherever_it_begins(first):
    clip = torch.rand(1, 11, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    network = nn.Conv3d(3, 3, 3, padding=1)
    reach = lambda x: network(x.transpose(1, 2)).transpose(1, 2)  # noqa: E731
    whole = restore(Applied(reach), clip, (4, 8, 8), (2, 4, 4), 1)
    asked = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return clip[:, start:stop]

    pieces = list(Tiling(Applied(reach), (4, 8, 8), (2, 4, 4), 1).stream(read, (11, 16, 24), first))

    assert asked == [span for span in tile_spans(11, 4, 2) if span[1] > first]
    assert [number for number, _ in pieces] == [first + sum(piece.shape[1] for _, piece in pieces[:i]) for i in range(len(pieces))]
    assert torch.equal(torch.cat([piece for _, piece in pieces], dim=1), whole[:, first:])


class Applied(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.function(clip)


def test_progress_is_told_of_every_tile():
    ticks = []
    restore(Recorder(), clip(1, 11, 3, 20, 50), (4, 16, 64), (1, 4, 8), 1, lambda: ticks.append(1))
    assert len(ticks) == 8


def test_every_module_gets_its_own_mode_back():
    network = Recorder().train()
    network.part.eval()
    restore(network, clip(1, 2, 3, 4, 4), (2, 4, 4), (0, 0, 0), 1)
    assert network.modes == [(False, False)]
    assert (network.training, network.part.training) == (True, False)


def test_the_mode_comes_back_after_an_error():
    network = nn.Conv3d(7, 7, 1).train()
    with pytest.raises(RuntimeError):
        restore(network, clip(1, 2, 3, 4, 4), (2, 4, 4), (0, 0, 0), 1)
    assert network.training


def test_what_a_network_keeps_from_a_restoration_is_fit_for_training():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))
            self.mask = None

        def forward(self, x: Tensor) -> Tensor:
            if self.mask is None:
                self.mask = torch.full((1,), 2.0)
            return x * (self.gain * self.mask)

    network = Keeps()
    restored = restore(network, clip(1, 2, 3, 4, 4), (2, 4, 4), (0, 0, 0), 1)
    assert not restored.requires_grad
    network(torch.ones(1, 2, 3, 4, 4)).sum().backward()
    assert network.gain.grad == 2 * 96


def test_an_overlap_as_large_as_the_tile_is_named():
    with pytest.raises(ValueError) as error:
        restore(Recorder(), clip(1, 2, 3, 4, 4), (2, 4, 4), (0, 4, 0), 1)
    assert str(error.value) == "overlap: expected 0 or more and less than the tile (2, 4, 4), found (0, 4, 0); lower evaluate.overlap"


def test_an_output_of_another_size_is_named():
    with pytest.raises(ValueError) as error:
        restore(Recorder(), clip(1, 2, 3, 4, 4), (2, 4, 4), (0, 0, 0), 4)
    assert str(error.value) == "output of the network for one tile: expected (1, 2, 3, 16, 16), found (1, 2, 3, 4, 4); check network.upscale"


def test_any_size_gives_a_network_of_strict_sizes_what_it_takes():
    seen = []

    class Strict(nn.Module):
        def forward(self, clip):
            seen.append(tuple(clip.shape))
            return clip.repeat_interleave(4, -1).repeat_interleave(4, -2)

    clip = torch.rand(1, 2, 3, 30, 75)
    restored = AnySize(Strict(), 4)(clip)
    assert seen == [(1, 2, 3, 32, 80)]
    assert torch.equal(restored, clip.repeat_interleave(4, -1).repeat_interleave(4, -2))


def test_tiles_go_together_as_far_as_memory_allows_and_come_out_the_same(monkeypatch):
    class Small(nn.Module):
        """Has memory for three tiles at once."""

        def __init__(self):
            super().__init__()
            self.tried = []

        def forward(self, x):
            self.tried.append(len(x))
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x[:, :, :3] * 0.5

    clip = torch.rand(1, 2, 3, 40, 40)
    alone = restore(Small(), clip, (2, 16, 16), (0, 8, 8), 1)
    monkeypatch.setattr(tiling, "most_at_once", lambda device, tiles: tiles)
    network = Small()
    assert torch.equal(restore(network, clip, (2, 16, 16), (0, 8, 8), 1), alone)
    assert network.tried == [16, 8, 4, *[2] * 8]


def test_a_gpu_takes_one_tile_after_the_other_where_bits_must_not_depend_on_free_memory():
    assert tiling.most_at_once(torch.device("cuda"), 16) == 16
    assert tiling.most_at_once(torch.device("cpu"), 16) == 1
    with determinism(True):
        assert tiling.most_at_once(torch.device("cuda"), 16) == 1


def test_how_many_tiles_go_together_is_found_once_for_all_clips_and_again_for_smaller_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "most_at_once", lambda device, tiles: tiles)

    class Small(nn.Module):
        """Has memory for so many pixels at once."""

        def __init__(self):
            super().__init__()
            self.tried, self.pixels = [], 3 * 16 * 16

        def forward(self, x):
            self.tried.append(len(x))
            if x[:, 0, 0].numel() > self.pixels:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x[:, :, :3] * 0.5

    network = Small()
    monkeypatch.setattr(tiling, "SMALLEST_TILE", 8)
    tiles = Tiling(network, (2, 16, 16), (0, 0, 0), 1)

    def restored() -> list[int]:
        network.tried.clear()
        # Two spans of time, of 16 tiles each.
        list(tiles.stream(lambda start, stop: clip(1, 4, 3, 64, 64)[:, start:stop], (4, 64, 64)))
        return list(network.tried)

    assert restored() == [16, 8, 4, *[2] * 16]
    assert restored() == [2] * 16
    network.pixels = 3 * 8 * 8
    assert restored() == [2, 1, 64, 32, 16, 8, 4, *[2] * 64]


def with_memory_for(side: int) -> nn.Module:
    """A network whose device holds tiles of that height and width at most."""

    class Network(nn.Module):
        def forward(self, x):
            if max(x.shape[-2:]) > side:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return Blur()(x)

    return Network()


def test_tiles_become_smaller_where_memory_holds_none_and_stay_so(caplog):
    counted = []
    restored = restore(with_memory_for(40), clip(1, 5, 3, 100, 70), (3, 80, 80), (1, 30, 30), 1, lambda: counted.append(1))
    assert torch.equal(restored, restore(Blur(), clip(1, 5, 3, 100, 70), (3, 40, 35), (1, 20, 17), 1))
    assert [record.message for record in caplog.records] == ["the device has too little memory for a tile: going on with tiles of 40 x 35 pixels"]
    assert len(counted) == tile_count((5, 100, 70), (3, 80, 80), (1, 30, 30)), "a bar ends at its end"


def test_smaller_tiles_stay_for_the_clips_that_follow(caplog):
    tiling = Tiling(with_memory_for(40), (3, 80, 80), (1, 8, 8), 1)
    for _ in range(2):
        list(tiling.stream(lambda start, stop: clip(1, 5, 3, 100, 70)[:, start:stop], (5, 100, 70)))
    assert len(caplog.records) == 1


def test_where_memory_does_not_hold_the_smallest_tile_it_is_said_what_to_lower():
    message = (
        r"^the device's memory does not hold a tile of 3 frames of 32 x 20 pixels \(CUDA out of memory\); "
        r"lower the first number of evaluate.tile, or end what else takes memory$"
    )
    with pytest.raises(TooLittleMemory, match=message):
        restore(with_memory_for(16), clip(1, 5, 3, 100, 20), (3, 80, 80), (1, 8, 8), 1)


def test_a_gpu_computes_in_full_float32_and_goes_back_to_what_it_did():
    class Seen(nn.Module):
        def forward(self, x):
            assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
            return x

    with computing("tf32"):
        restore(Seen(), clip(1, 2, 3, 16, 16), (2, 16, 16), (1, 8, 8), 1)
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
