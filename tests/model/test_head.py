"""Convolutions of frames."""

import torch
import torch.nn.functional as F

from vrt.model.head import FrameConv, UpsampleBy4


def test_a_frame_convolution_is_the_3d_convolution_its_weights_were_trained_as() -> None:
    conv, x = FrameConv(3, 5).double(), torch.rand(4, 3, 6, 7, dtype=torch.float64)
    expected = F.conv3d(x.transpose(0, 1).unsqueeze(0), conv.weight, conv.bias, padding=(0, 1, 1)).squeeze(0).transpose(0, 1)
    torch.testing.assert_close(conv(x), expected)


def test_upsampling_quadruples_the_sides() -> None:
    assert UpsampleBy4(8)(torch.rand(2, 8, 3, 5)).shape == (2, 8, 12, 20)
