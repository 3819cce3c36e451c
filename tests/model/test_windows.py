"""Windows: cutting, shifting, labels, encodings."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrt.model.windows import fit_window, merge, partition, relative_position_index, separate, sine_encoding

sizes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None, max_examples=50)
@given(size=sizes, window=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
def test_merging_undoes_partitioning(size: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    window, shift = fit_window(size, window, tuple(w // 2 for w in window), least_depth=1)
    x = torch.rand(2, *size, 3)
    windows, padded = partition(x, window, shift)
    assert torch.equal(merge(windows, padded, size, window, shift), x)


def test_tokens_are_in_the_order_frame_row_column() -> None:
    x = torch.arange(2 * 4 * 4).view(1, 2, 4, 4, 1)
    windows, _ = partition(x, (2, 2, 2), (0, 0, 0))
    assert windows[1].flatten().tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_windows_shrink_to_the_map_and_are_then_not_shifted_but_keep_two_frames_for_mutual_attention() -> None:
    assert fit_window((6, 6, 12), (6, 8, 8), (3, 4, 4), least_depth=1) == ((6, 6, 8), (0, 0, 4))
    assert fit_window((1, 8, 9), (2, 8, 8), (1, 4, 4), least_depth=2) == ((2, 8, 8), (0, 0, 4))


def test_only_tokens_that_were_neighbours_before_the_shift_see_one_another() -> None:
    separation = separate((2, 6, 6), (2, 3, 3), (0, 1, 1), torch.device("cpu"))
    x = torch.arange(36.0).view(1, 1, 6, 6, 1).expand(1, 2, 6, 6, 1).contiguous()
    tokens, _ = partition(x, (2, 3, 3), (0, 1, 1))
    scores = separation.scores(slice(None), windows=4, tokens=18)
    for window, apart in zip(tokens.squeeze(2), scores.squeeze(1)):
        far = ((window[:, None] // 6 - window // 6).abs() >= 3) | ((window[:, None] % 6 - window % 6).abs() >= 3)
        assert torch.equal(apart, far * -100.0)
    assert [int((apart == 0).sum()) for apart in scores] == [18**2, 180, 180, 100]


def test_windows_that_the_shift_leaves_whole_need_no_mask() -> None:
    separation = separate((2, 9, 9), (2, 3, 3), (0, 1, 1), torch.device("cpu"))
    assert separation.scores(slice(0, 2), windows=9, tokens=18) is None
    # The second clip's windows are those of the first again.
    assert torch.equal(separation.scores(slice(11, 12), windows=18, tokens=18), separation.scores(slice(2, 3), windows=18, tokens=18))


@pytest.mark.parametrize("window", [(2, 8, 8), (6, 8, 8), (8, 8, 8), (4, 8, 8), (1, 8, 8), (2, 4, 4), (6, 4, 4)])
def test_relative_positions_are_numbered_as_published(window: tuple[int, int, int], numbers: Callable) -> None:
    known = numbers("buffers")["relative_position_index_{}_{}_{}".format(*window)]
    assert torch.equal(relative_position_index(window), known.long())


@pytest.mark.parametrize("dim", [12, 16, 24, 96, 120])
@pytest.mark.parametrize("side", [4, 8])
def test_sine_encoding_has_the_published_bits(dim: int, side: int, numbers: Callable) -> None:
    assert torch.equal(sine_encoding(side, side, dim), numbers("buffers")[f"position_bias_dim{dim}_{side}x{side}"])
