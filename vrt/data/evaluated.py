"""Clips of validation and test as they are evaluated: degraded in the same way whenever and by whomever, and read piece by piece.

Legend: D frames that are restored, C channels, H height, W width of the truth, h, w of the degraded input.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from vrt.data.clips import Clip, PreparedData
from vrt.data.degrading import as_floats, exposures, reduced, with_noise
from vrt.data.errors import DataError
from vrt.params import Between, Bicubic, BlurDown, MotionBlur, Noise, Params, Recorded


class EvaluatedClip:
    """One clip, read from its beginning to its end; no more of it is held than what is asked for.

    The noise depends on the clip's name alone, not on the training's seed, so that trainings compare. For a reduction the bottom and right
    rest of height and width that do not divide by the scale are cut off. For `between` every second frame is given, and those are made
    that lie in the middle of params.network.img_size[0] of them.
    Raises DataError where the clip has too few frames for that.
    """

    def __init__(self, data: PreparedData, params: Params, clip: Clip):
        self._data, self._params, self._clip = data, params, clip
        self.name = clip.name
        self.count = _count(params, clip)
        """Frames that are restored."""
        scale = params.degradation.scale if isinstance(params.degradation, Bicubic | BlurDown) else 1
        self.height, self.width = (size - size % scale for size in (clip.height, clip.width))
        """Of the truth."""
        self._rng = np.random.default_rng(list(hashlib.sha256(_name_of_old(clip)).digest()))
        self._noisy: list[Tensor] = []
        self._begins = 0

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Degraded (D, C, h, w) and truth (D, 3, H, W) of frames `start` to `stop`, the former of which never goes back.

        For `between` degraded has the given frames around each of those that are made: img_size[0] - 1 more than the truth.
        """
        match self._params.degradation:
            case Noise() as noise:
                return self._noisy_frames(start, stop, noise.sigma_test), self._frames(start, stop)
            case Bicubic() | BlurDown() as reduction:
                truth = self._frames(start, stop)
                return reduced(truth, reduction), truth
            case MotionBlur() as blur:
                return exposures(self._frames(start * blur.frames, stop * blur.frames), blur.frames)
            case Recorded():
                degraded, truth = (self._frames(start, stop, recorded) for recorded in (True, False))
                return degraded, truth
            case Between():
                given = self._params.network.img_size[0]
                around = self._frames(2 * start, 2 * (stop + given - 1) - 1)
                return around[::2], around[given - 1 :: 2][: stop - start]

    def _frames(self, start: int, stop: int, recorded: bool = False) -> Tensor:
        return as_floats(self._data.read(self._clip, start, stop - start, 0, 0, self.height, self.width, recorded))

    def _noisy_frames(self, start: int, stop: int, sigma: float) -> Tensor:
        while self._begins + len(self._noisy) < stop:
            number = self._begins + len(self._noisy)
            self._noisy.append(with_noise(self._frames(number, number + 1), sigma, self._rng, self._params))
        self._noisy, self._begins = self._noisy[start - self._begins :], start
        return torch.cat(self._noisy[: stop - start])


def _count(params: Params, clip: Clip) -> int:
    match params.degradation:
        case Between():
            given = params.network.img_size[0]
            count, least = (clip.frames + 1) // 2 - given + 1, 2 * given - 1
        case MotionBlur() as blur:
            count, least = clip.frames // blur.frames, blur.frames
        case _:
            return clip.frames
    if count < 1:
        raise DataError(f"clip {clip}: expected at least {least} frames to make one of, found {clip.frames}; use longer clips")
    return count


def _name_of_old(clip: Clip) -> bytes:
    """What clips were called when the first results were published with this noise."""
    return f"{clip.split}/{clip.name}.npy".encode()
