"""Degradations against numbers worked out by hand, MATLAB's definition and Pillow."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vrt.data.degradations import add_noise, bicubic_downsample, bicubic_weights, blur_downsample, blur_reach, continue_backwards

# Keys' cubic with a = -0.5 at 0.125, 0.375, ... 1.875, divided by 4: what imresize gives each pixel for a scale of 1/4.
HALF = (0.240966796875, 0.181884765625, 0.097412109375, 0.022705078125, -0.011962890625, -0.018310546875, -0.010986328125, -0.001708984375)


def random_clip(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).random(shape, dtype=np.float32))


def matlab_matrix(size: int, scale: int) -> np.ndarray:
    """(size / scale, size): imresize's `contributions`, with its loops, its 1-based positions and its mirror index."""

    def cubic(x: float) -> float:
        x = abs(x)
        return (1.5 * x**3 - 2.5 * x**2 + 1) * (x <= 1) + (-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (1 < x <= 2)

    mirror = [*range(size), *reversed(range(size))]
    matrix = np.zeros((size // scale, size))
    for row in range(size // scale):
        u = (row + 1) * scale + 0.5 * (1 - scale)
        left = int(np.floor(u - 4 * scale / 2))
        weights = {k: cubic((u - k) / scale) for k in range(left, left + 4 * scale + 2)}
        for k, weight in weights.items():
            matrix[row, mirror[(k - 1) % (2 * size)]] += weight / sum(weights.values())
    return matrix


def test_the_weights_for_scale_4_are_those_worked_out_by_hand():
    np.testing.assert_allclose(bicubic_weights(4), [*HALF[::-1], *HALF], rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_reduction_equals_matlabs_definition_borders_included(scale: int):
    clip = random_clip(2, 3, 12 * scale, scale)
    rows, columns = matlab_matrix(12 * scale, scale), matlab_matrix(scale, scale)
    expected = np.einsum("ih,jw,dchw->dcij", rows, columns, clip.double().numpy())
    np.testing.assert_allclose(bicubic_downsample(clip, scale).numpy(), expected, atol=1e-6)


def test_reduction_equals_pillows_away_from_the_borders():
    clip = random_clip(1, 3, 64, 48)
    reduced = bicubic_downsample(clip, 4)[0]
    for ours, channel in zip(reduced, clip[0]):
        pillows = np.asarray(Image.fromarray(channel.numpy()).resize((12, 16), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(ours.numpy()[2:-2, 2:-2], pillows[2:-2, 2:-2], atol=1e-6)


@settings(deadline=None)
@given(value=st.floats(0, 1, width=32), height=st.integers(1, 6), width=st.integers(1, 6))
def test_reduction_preserves_constants(value: float, height: int, width: int):
    clip = torch.full((1, 3, 4 * height, 4 * width), value)
    torch.testing.assert_close(bicubic_downsample(clip, 4), torch.full((1, 3, height, width), value), rtol=0, atol=1e-6)


def test_reduction_preserves_a_slope_without_shifting_it():
    """Output i lies at input 4 i + 1.5: a half-pixel shift would move the values."""
    slope = torch.arange(64, dtype=torch.float32).expand(1, 3, 4, 64) / 64
    inner = bicubic_downsample(slope, 4)[0, 0, 0, 2:-2]
    torch.testing.assert_close(inner, (4 * torch.arange(2, 14) + 1.5) / 64)


@pytest.mark.parametrize("reduce", [lambda clip: bicubic_downsample(clip, 4), lambda clip: blur_downsample(clip, 4, 1.6)], ids=["BI", "BD"])
def test_reduction_does_not_depend_on_the_number_of_threads(reduce: Callable[[torch.Tensor], torch.Tensor]):
    clip = random_clip(4, 3, 128, 128)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(reduce(clip))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="bicubic reduction: expected a width divisible by 4, found 30; crop the clip to 28"):
        bicubic_downsample(torch.zeros(1, 3, 8, 30), 4)
    with pytest.raises(ValueError, match="blur-down reduction: expected a height divisible by 4, found 9; crop the clip to 8"):
        blur_downsample(torch.zeros(1, 3, 9, 8), 4, 1.6)


def matlab_blur_down(plane: np.ndarray, scale: int, sigma: float) -> np.ndarray:
    """(H, W) -> (H / scale, W / scale): fspecial, imfilter with 'replicate' and (scale/2 : scale : end), pixel by pixel and 1-based."""
    side = 2 * int(np.ceil(3 * sigma)) + 2
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    kernel = np.exp(-(x * x + y * y) / (2 * sigma * sigma))
    kernel /= kernel.sum()
    height, width = plane.shape
    origin = (side + 1) // 2
    reduced = np.zeros((height // scale, width // scale))
    for i, row in enumerate(range(scale // 2, height + 1, scale)):
        for j, column in enumerate(range(scale // 2, width + 1, scale)):
            rows = [min(max(row + k - origin, 1), height) - 1 for k in range(1, side + 1)]
            columns = [min(max(column + k - origin, 1), width) - 1 for k in range(1, side + 1)]
            reduced[i, j] = (kernel * plane[np.ix_(rows, columns)]).sum()
    return reduced


@pytest.mark.parametrize("sigma", [0.7, 1.6, 3.0])
def test_blur_down_equals_matlabs_definition_borders_included(sigma: float):
    clip = random_clip(1, 3, 24, 16)
    expected = np.stack([matlab_blur_down(plane, 4, sigma) for plane in clip[0].double().numpy()])
    np.testing.assert_allclose(blur_downsample(clip, 4, sigma)[0].numpy(), expected, atol=1e-6)


def test_blur_down_samples_the_centre_of_each_block():
    """As the bicubic reduction does: a network trained on the one sees the other unshifted."""
    slope = torch.arange(64, dtype=torch.float32).expand(1, 3, 4, 64) / 64
    torch.testing.assert_close(blur_downsample(slope, 4, 1.6)[0, 0, 0, 2:-2], (4 * torch.arange(2, 14) + 1.5) / 64)


@pytest.mark.parametrize("sigma", [0.3, 1.6, 2.5, 8.0])
def test_blur_down_looks_as_far_as_its_reach_and_no_further(sigma: float):
    reach = blur_reach(4, sigma)
    dark = torch.zeros(1, 3, 4, 4 * (2 * reach + 5))
    middle = reach + 2
    clip = dark.clone()
    clip[..., : 4 * (middle - reach)] = 1
    assert blur_downsample(clip, 4, sigma)[0, 0, 0, middle] == 0
    clip[..., : 4 * (middle - reach + 1)] = 1
    assert blur_downsample(clip, 4, sigma)[0, 0, 0, middle] > 0


@pytest.mark.parametrize(
    "length, frames, expected",
    [(7, 8, [0, 1, 2, 3, 4, 5, 6, 6]), (3, 8, [0, 1, 2, 2, 1, 0, 0, 1]), (1, 3, [0, 0, 0]), (5, 5, [0, 1, 2, 3, 4]), (5, 2, [0, 1, 2, 3, 4])],
)
def test_a_short_clip_is_continued_by_its_own_frames_backwards(length: int, frames: int, expected: list[int]):
    clip = torch.arange(length).view(1, length, 1, 1, 1).expand(2, length, 3, 4, 5)
    continued = continue_backwards(clip, frames)
    assert continued.shape == (2, len(expected), 3, 4, 5)
    assert continued[0, :, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize("sigma", [5, 30, 50])
def test_noise_has_the_standard_deviation_asked_for(sigma: int):
    noise = add_noise(torch.zeros(6, 3, 256, 256), sigma, np.random.default_rng(2)) * 255
    # 1,179,648 draws: the mean's own deviation is sigma / 1086, that of the measured sigma sigma / 1536.
    assert abs(noise.mean()) < 4 * sigma / 1086
    assert abs(noise.std() - sigma) < 4 * sigma / 1536
    inside = (noise.abs() < sigma).float().mean()
    assert abs(inside - 0.6827) < 0.01


def test_noise_is_independent_between_frames_channels_and_pixels():
    noise = add_noise(torch.zeros(8, 3, 64, 64), 255, np.random.default_rng(3))
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        assert abs((a * b).mean()) < 0.02


def test_no_noise_changes_nothing_and_equal_generators_give_equal_noise():
    clip = random_clip(2, 3, 8, 8)
    assert torch.equal(add_noise(clip, 0, np.random.default_rng(4)), clip)
    assert torch.equal(add_noise(clip, 9, np.random.default_rng(4)), add_noise(clip, 9, np.random.default_rng(4)))
