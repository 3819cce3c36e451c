"""Pictures hold the very pixels of the frames, at the right place, and the same bytes every time."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vrt.evaluation.pictures import CAPTION_HEIGHT, CROP_ZOOM, GAP, PAPER, Place, Triple, comparison, png, preview, worst_crop


def as_pixels(frame: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture
def triple(texture) -> Triple:
    truth = texture(1, 40, 160, seed=1)[0]
    return Triple(truth + 0.1, truth + 0.02, truth)


def test_a_preview_shows_input_restored_and_truth_side_by_side(triple):
    picture = preview(*triple)
    assert picture.mode == "RGB" and picture.size == (3 * 160 + 2 * GAP, 40 + CAPTION_HEIGHT)
    pixels = np.asarray(picture)
    for column, frame in enumerate(triple):
        left = column * (160 + GAP)
        np.testing.assert_array_equal(pixels[CAPTION_HEIGHT:, left : left + 160], as_pixels(frame))
        caption = pixels[:CAPTION_HEIGHT, left : left + 160]
        assert (caption != PAPER).any(), "there is a caption above every column"
    assert (pixels[:, 160 : 160 + GAP] == PAPER).all(), "columns are apart"


def test_the_caption_tells_the_psnr(triple):
    same = np.asarray(preview(*triple))
    other = np.asarray(preview(triple.degraded, triple.restored - 0.01, triple.truth))
    columns = [slice(0, 160), slice(160 + GAP, 320 + GAP), slice(320 + 2 * GAP, None)]
    changed = [bool((same[:CAPTION_HEIGHT, column] != other[:CAPTION_HEIGHT, column]).any()) for column in columns]
    assert changed == [False, True, False]


def test_narrow_frames_are_enlarged_by_a_whole_number(texture):
    truth = texture(1, 20, 50, seed=2)[0]
    picture = preview(truth, truth, truth)
    assert picture.size == (3 * 150 + 2 * GAP, 60 + CAPTION_HEIGHT)
    np.testing.assert_array_equal(np.asarray(picture)[CAPTION_HEIGHT:, :150], as_pixels(truth).repeat(3, 0).repeat(3, 1))


def test_the_input_of_super_resolution_is_enlarged_and_a_noise_map_left_out(texture):
    truth = texture(1, 160, 160, seed=3)[0]
    small = torch.full((4, 40, 40), 0.5)
    picture = preview(small, truth, truth)
    assert picture.size == (3 * 160 + 2 * GAP, 160 + CAPTION_HEIGHT)
    assert (np.asarray(picture)[CAPTION_HEIGHT:, :160] == 128).all()


def test_the_same_frames_give_the_same_bytes(triple):
    assert png(preview(*triple)) == png(preview(*(frame.clone() for frame in triple)))
    assert png(comparison([("lake", triple)])) == png(comparison([("lake", triple)]))


def test_a_png_holds_every_pixel(triple):
    picture = preview(*triple)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), np.asarray(picture))


def test_the_worst_crop_is_where_the_error_is_largest():
    truth = torch.zeros(4, 3, 100, 120)
    restored = truth.clone()
    restored[1, :, 10:20, 10:20] = 0.1
    restored[2, :, 30:94, 50:114] = 0.3
    _, place = worst_crop(restored, truth)
    assert place == Place(frame=2, top=30, left=50, height=64, width=64)
    assert torch.equal(place.cut(restored), torch.full((3, 64, 64), 0.3))


@given(frames=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 12), side=st.integers(1, 8), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_no_crop_is_worse_than_the_worst(frames, height, width, side, seed):
    restored = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))
    error, place = worst_crop(restored, torch.zeros_like(restored), side)
    sides = min(side, height), min(side, width)
    assert (place.height, place.width) == sides
    squares = restored.double().square().unfold(2, sides[0], 1).unfold(3, sides[1], 1).sum((1, 4, 5))
    assert place.cut(restored).double().square().sum().item() == pytest.approx(squares.max().item(), rel=1e-9)


def test_equal_clips_have_their_first_square_as_worst():
    assert worst_crop(torch.ones(2, 3, 70, 70), torch.ones(2, 3, 70, 70)) == (0.0, Place(0, 0, 0, 64, 64))


def test_a_comparison_is_a_titled_row_per_clip(texture):
    frames = texture(2, 64, 64, seed=4)
    rows = [("lake", Triple(frames[0], frames[1], frames[0])), ("tree", Triple(frames[1], frames[0], frames[1]))]
    picture = comparison(rows)
    side, row_height = 64 * CROP_ZOOM, 64 * CROP_ZOOM + 2 * CAPTION_HEIGHT
    assert picture.size == (3 * side + 2 * GAP, 2 * row_height + GAP)
    pixels = np.asarray(picture)
    for i, (_, images) in enumerate(rows):
        top = i * (row_height + GAP)
        assert (pixels[top : top + CAPTION_HEIGHT] != PAPER).any(), "there is a title"
        for column, image in enumerate(images):
            left = column * (side + GAP)
            found = pixels[top + 2 * CAPTION_HEIGHT : top + row_height, left : left + side]
            np.testing.assert_array_equal(found, as_pixels(image).repeat(CROP_ZOOM, 0).repeat(CROP_ZOOM, 1))
