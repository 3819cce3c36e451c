"""How frames of a source become frames of an output: restored one by one, or doubled with others made in between.

Both read the source once, in order, and hold only the frames that the tiles at hand need.
Axes: B batch (1), D frames, C channels, H height, W width.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vrt.data.degradations import continue_backwards
from vrt.data.degrading import as_floats
from vrt.evaluation.baseline import baseline
from vrt.evaluation.between import Interpolating, group
from vrt.evaluation.tiling import AnySize, Size
from vrt.stages.footage import Source
from vrt.stages.selector import Chosen


class Making(Protocol):
    """What is made of a source's frames, by which network."""

    network: nn.Module
    size: Size
    """Frames, height and width of what goes into the network."""
    overlap: Size
    upscale: int
    begins: int
    """The first of these frames that is still to be made something of."""

    def read(self, start: int, stop: int) -> Tensor:
        """What goes into the network for these frames: (1, stop - start, C, H, W)."""

    def frames(self, first: int, piece: Tensor) -> tuple[int, np.ndarray]:
        """What came out for the frames from `first` on, (1, D, 3, H, W), as frames of the output and the number of the first of these."""

    def before(self, first: int, count: int) -> Tensor:
        """What one had without the network of the `count` frames that `frames` gave for `first`: (count, 3, h, w) in [0, 1]."""


class Restoring:
    """Each frame restored."""

    def __init__(self, source: Source, done: int, chosen: Chosen, level: float | None):
        settings = chosen.params
        self._window, self._level, self._count, self._least = Window(source), level, source.count, settings.network.img_size[0]
        self.network, self.upscale, self.overlap = (
            AnySize(chosen.network, settings.network.upscale),
            settings.network.upscale,
            settings.evaluate.overlap,
        )
        self.size, self.begins = (max(source.count, self._least), *self._window.size), done
        self._whole: np.ndarray | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """(1, D, C, H, W) in [0, 1], a noise level the fourth channel; a source shorter than the network's clip goes on backwards."""
        if self._count < self._least:
            # Few frames, and tiles may be shorter still: what follows the source's end may be any of them.
            self._whole = self._window.read(0, self._count) if self._whole is None else self._whole
            clip = continue_backwards(as_floats(self._whole)[None], self._least)[:, start:stop]
        else:
            clip = as_floats(self._window.read(start, stop))[None]
        if self._level is not None:
            clip = torch.cat([clip, torch.full_like(clip[:, :, :1], self._level)], dim=2)
        return clip

    def frames(self, first: int, piece: Tensor) -> tuple[int, np.ndarray]:
        """The frames themselves, as many as the source has: (D, H, W, 3)."""
        return first, self._window.quantised(piece[0, : max(0, self._count - first)])

    def before(self, first: int, count: int) -> Tensor:
        """The source's own frames: (count, 3, h, w) in [0, 1]."""
        return as_floats(self._window.held(first, first + count))


class Doubling:
    """Each frame as it was, and after each but the last the one that the network makes half-way to the next.

    Beyond both ends the clip stands still: its first and last frame are repeated where the network wants more neighbours.
    """

    def __init__(self, source: Source, done: int, chosen: Chosen):
        settings = chosen.params
        self._given, self.upscale, self.overlap = settings.network.img_size[0], settings.network.upscale, settings.evaluate.overlap
        self.network = AnySize(Interpolating(chosen.network, self._given), self.upscale)
        self._window, self._count = Window(source), source.count
        self.size, self.begins = (source.count - 1, *self._window.size), done // 2

    def read(self, start: int, stop: int) -> Tensor:
        """(1, stop - start, G * 3, H, W) in [0, 1]: the G given frames around each gap as the channels of one."""
        around = self._given // 2 - 1
        first, last = max(0, start - around), min(self._count, stop + 1 + around)
        numbers = np.arange(start - around, stop + 1 + around).clip(0, self._count - 1) - first
        return group(as_floats(self._window.read(first, last))[None, numbers], self._given)

    def frames(self, first: int, piece: Tensor) -> tuple[int, np.ndarray]:
        """Given and made frames in turn, (2D, H, W, 3); with the last gap comes the last frame of the source."""
        made = self._window.quantised(piece[0])
        given = self._window.held(first, first + len(made))
        both = np.stack([given, made], axis=1).reshape(-1, *made.shape[1:])
        if first + len(made) == self._count - 1:
            both = np.concatenate([both, self._window.held(self._count - 1, self._count)])
        return 2 * first, both

    def before(self, first: int, count: int) -> Tensor:
        """(count, 3, h, w) in [0, 1]: given frames, and in each gap the mean of the two around it."""
        given = as_floats(self._window.held(first, first + count // 2 + 1))
        pairs = torch.stack([given[:-1], (given[:-1] + given[1:]) / 2], dim=1).flatten(0, 1)
        return torch.cat([pairs, given[-1:]])[:count]


class Window:
    """The frames at hand of a source that is read once, in order."""

    def __init__(self, source: Source):
        self._frames, self._peak = source.frames(), 65535 if source.deep else 255
        self._peeked: np.ndarray | None = next(self._frames)
        self.size = self._peeked.shape[:2]
        self._held: list[np.ndarray] = []
        self._begins = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames `start` to `stop`, (D, H, W, 3); those before `start` are let go."""
        while self._begins + len(self._held) < stop:
            self._held.append(self._peeked if self._peeked is not None else next(self._frames))
            self._peeked = None
            if self._begins + len(self._held) <= start:
                # Not even looked at: an earlier run dealt with it.
                self._held, self._begins = [], self._begins + len(self._held)
        self._held, self._begins = self._held[start - self._begins :], start
        return np.stack(self._held[: stop - start])

    def held(self, start: int, stop: int) -> np.ndarray:
        """Frames that were read and not let go, (D, H, W, 3)."""
        assert self._begins <= start and stop <= self._begins + len(self._held), f"{start} to {stop} of {self._begins} + {len(self._held)}"
        return np.stack(self._held[start - self._begins : stop - self._begins])

    def quantised(self, frames: Tensor) -> np.ndarray:
        """(D, 3, H, W) as pixels of the source's kind: (D, H, W, 3)."""
        levels = (frames.clamp(0, 1) * self._peak).round().permute(0, 2, 3, 1).numpy()
        return levels.astype(np.uint8 if self._peak == 255 else np.uint16)


def side_by_side(before: Tensor, after: np.ndarray) -> np.ndarray:
    """(D, 3, h, w) in [0, 1], enlarged, and to the right of it (D, H, W, 3): (D, H, 2 W, 3) of the latter's kind."""
    peak = np.iinfo(after.dtype).max
    shown = (baseline(before, *after.shape[1:3]) * peak).round().permute(0, 2, 3, 1).numpy().astype(after.dtype)
    return np.concatenate([shown, after], axis=2)
