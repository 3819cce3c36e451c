"""Pictures for people: input, restored and truth beside each other. The same frames give the same bytes.

Axes: D frames, C channels, H height, W width. Frames are RGB in [0, 1].
"""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vrt.evaluation.baseline import baseline
from vrt.evaluation.metrics import psnr

CAPTION_HEIGHT = 18
GAP = 4
INK = (235, 235, 235)
PAPER = (24, 24, 28)
# The narrowest column that holds a caption such as "restored 24.38 dB".
COLUMN_WIDTH = 144
CROP = 64
CROP_ZOOM = 3


class Triple(NamedTuple):
    """One place of one frame three times, each (3, H, W) in [0, 1]."""

    degraded: Tensor
    restored: Tensor
    truth: Tensor


class Place(NamedTuple):
    """A square of a clip: its frame, its upper left corner and its sides, in pixels."""

    frame: int
    top: int
    left: int
    height: int
    width: int

    def cut(self, frames: Tensor) -> Tensor:
        """(D, C, H, W) -> (C, height, width)."""
        return frames[self.frame, :, self.top : self.top + self.height, self.left : self.left + self.width]


def preview(degraded: Tensor, restored: Tensor, truth: Tensor) -> Image.Image:
    """Input, restored and truth of one frame side by side under a caption with the PSNR of each.

    `degraded` is (C >= 3, h, w) and is enlarged to the size of the truth; the others are (3, H, W). Frames too narrow for their
    caption are enlarged by a whole number (nearest pixel).
    """
    shown = baseline(degraded[None], *truth.shape[-2:])[0]
    return _row(Triple(shown, restored, truth), "", least_zoom=1)


def worst_crop(restored: Tensor, truth: Tensor, side: int = CROP) -> tuple[float, Place]:
    """Where a clip is restored worst: the square with the largest sum of squared errors, the first of equals; and that sum.

    (D, 3, H, W) twice; an axis shorter than `side` is taken whole.
    """
    height, width = (min(side, length) for length in truth.shape[-2:])
    best, place = -1.0, Place(0, 0, 0, height, width)
    for frame, (ours, real) in enumerate(zip(restored, truth)):
        # Summed-area table: the error of every square at the price of one pass.
        table = np.zeros((real.shape[-2] + 1, real.shape[-1] + 1))
        table[1:, 1:] = (ours - real).double().square().sum(0).cpu().numpy().cumsum(0).cumsum(1)
        errors = table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
        top, left = np.unravel_index(errors.argmax(), errors.shape)
        if errors[top, left] > best:
            best, place = float(errors[top, left]), Place(frame, int(top), int(left), height, width)
    return best, place


def comparison(rows: Sequence[tuple[str, Triple]]) -> Image.Image:
    """The worst squares of several clips, each a titled row of input, restored and truth, enlarged CROP_ZOOM times (small ones more)."""
    pictures = [_row(crops, title, CROP_ZOOM) for title, crops in rows]
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures) + GAP * (len(pictures) - 1)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + GAP
    return sheet


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file, without loss."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _row(images: Triple, title: str, least_zoom: int) -> Image.Image:
    """Three captioned columns; a `title`, if any, stands on a line above them."""
    before, after = (psnr(image, images.truth).item() for image in images[:2])
    captions = [f"input {before:.2f} dB", f"restored {after:.2f} dB", "truth"]
    zoom = max(least_zoom, math.ceil(COLUMN_WIDTH / images.truth.shape[-1]))
    height, width = (side * zoom for side in images.truth.shape[-2:])
    lines = 2 if title else 1
    picture = Image.new("RGB", (3 * width + 2 * GAP, height + lines * CAPTION_HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    if title:
        draw.text((GAP, 2), title, INK, font)
    for column, (image, caption) in enumerate(zip(images, captions)):
        left = column * (width + GAP)
        draw.text((left + GAP, (lines - 1) * CAPTION_HEIGHT + 2), caption, INK, font)
        picture.paste(_picture(image).resize((width, height), Image.Resampling.NEAREST), (left, lines * CAPTION_HEIGHT))
    return picture


def _picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an 8-bit RGB image."""
    return Image.fromarray(image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy())
