"""Changes of scale."""

import torch

from vrt.model.stage import depth_to_space, space_to_depth


def test_space_to_depth_orders_channels_by_column_row_channel() -> None:
    x = torch.arange(8.0).view(1, 1, 2, 2, 2)
    # Pixels (row, column): (0, 0) = 0 1, (0, 1) = 2 3, (1, 0) = 4 5, (1, 1) = 6 7.
    assert space_to_depth(x).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_depth_to_space_undoes_space_to_depth() -> None:
    x = torch.rand(2, 3, 4, 6, 8)
    assert torch.equal(depth_to_space(space_to_depth(x)), x)
