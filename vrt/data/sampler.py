"""What a training step sees: a function of (seed, step, index within the global batch), and of nothing else.

There is no cursor, no epoch and no shuffled list, so neither a restart nor the number of workers changes a sample, and
a resumed training needs no fast-forward.

Legend: B clips, D frames, C channels, H height, W width of the ground truth, h, w of the degraded input.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vrt.data.clips import NO_RECORDING, SPLITS, Clip, DataError, PreparedData, Split
from vrt.data.degradations import BICUBIC_REACH, blur_reach, continue_backwards
from vrt.data.degrading import as_floats, exposures, reduced, with_noise
from vrt.params import Between, Bicubic, BlurDown, MotionBlur, Noise, Params, Recorded

# So many damaged clips in a row are no chance: the disk is gone.
MOST_DRAWS = 10
# Keeps these draws apart from all others that are made from the same seed and step.
STREAM = 0x_DA7A


@dataclass(frozen=True)
class Batch:
    """What a step trains on: this process's share of it."""

    degraded: Tensor
    """(B, D, C, h, w) float32. C is 3, or 4 with the noise level (sigma / 255, constant) last. Noise may leave [0, 1]."""
    truth: Tensor
    """(B, D, 3, H, W) float32 in [0, 1]; for `between` (B, 1, 3, H, W), the frame to make."""
    skipped: tuple[str, ...] = ()
    """What was drawn and could not be read, each in a sentence, with `data.damaged: skip`; another draw took its place."""


def check_sampling(data: PreparedData, params: Params) -> None:
    """Raises DataError where a clip is too small for the training or its evaluation, lacks its recording, or a split is empty."""
    for split in SPLITS:
        if not data.clips(split):
            raise DataError(f"{data.root}: expected clips in the split {split}, found none; add some to data/raw/{data.index.dataset}/dataset.yaml")
        for clip in data.clips(split):
            _check_clip(clip, params)


def _check_clip(clip: Clip, params: Params) -> None:
    trained = clip.split == "train"
    if isinstance(params.degradation, Recorded) and clip.recorded is None:
        raise DataError(f"clip {clip}: {NO_RECORDING}")
    wanted = least_frames(params, clip.split)
    if clip.frames < wanted:
        needed = f"train.frames = {wanted} frames" if wanted == params.train.frames else f"{wanted} frames for train.frames = {params.train.frames}"
        raise DataError(f"clip {clip}: expected at least {needed}, found {clip.frames}; lower train.frames or use longer clips")
    if trained and min(clip.height, clip.width) < params.train.crop:
        raise DataError(
            f"clip {clip}: expected frames of at least train.crop = {params.train.crop} pixels, found {clip.height}x{clip.width}; "
            f"lower train.crop or use larger frames"
        )


def least_frames(params: Params, split: Split) -> int:
    """Fewer frames than these no clip of the split may have."""
    if split == "train" or isinstance(params.degradation, Between):
        return window_frames(params)
    return params.degradation.frames if isinstance(params.degradation, MotionBlur) else 1


def window_frames(params: Params) -> int:
    """Consecutive frames of a clip that a training sample is made of."""
    if isinstance(params.degradation, Between):
        return 2 * params.train.frames - 1
    exposed = params.degradation.frames if isinstance(params.degradation, MotionBlur) else 1
    return (params.train.frames - params.train.mirrored_frames) * exposed


class Reads:
    """What becomes of the reading of clips; who wants to know what is being read overrides `begin`."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def begin(self, what: str) -> None:
        """`what`, step, sample and clip in words, is read next."""


def training_sample(data: PreparedData, params: Params, step: int, index: int, reads: Reads | None = None) -> tuple[Tensor, Tensor]:
    """Sample `index` of the global batch of `step`: degraded (D, C, h, w) and truth (D, 3, H, W), for `between` (1, 3, H, W).

    Every window of `window_frames` frames of the training split is equally likely, and every crop position in it, every
    flip and quarter turn, and every noise level from sigma_min to sigma_max. With `data.damaged: skip` another clip is drawn for
    one that can't be read.
    Raises DataError, which names step and clip.
    """
    reads = reads or Reads()
    for draw in range(MOST_DRAWS):
        rng = np.random.default_rng([params.seed, STREAM, step, index, *([draw] if draw else [])])
        clip, first = _draw_window(data, window_frames(params), rng)
        where = f"step {step}, sample {index}, clip {clip}"
        reads.begin(where)
        try:
            degraded, truth = _draw_crop(data, clip, first, params, rng)
        except DataError as error:
            if params.data.damaged == "stop":
                raise DataError(f"{where}: {error}, or set data.damaged: skip to train without it") from error
            reads.skipped.append(f"{where}: {error}")
            continue
        if params.train.mirrored_frames:
            degraded, truth = (continue_backwards(frames, params.train.frames) for frames in (degraded, truth))
        turns = rng.integers(2, size=3)
        return _turn(degraded, turns), _turn(truth, turns)
    raise DataError(f"{MOST_DRAWS} clips drawn one after another can't be read; the last: {reads.skipped[-1]}")


def _draw_crop(data: PreparedData, clip: Clip, first: int, params: Params, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Degraded and truth of a window of the clip at a place drawn from `rng`."""
    side, frames = params.train.crop, window_frames(params)

    def draw_place() -> tuple[int, int, int, int]:
        top, left = (int(rng.integers(size - side + 1)) for size in (clip.height, clip.width))
        return top, left, side, side

    match params.degradation:
        case Noise() as noise:
            sigma = rng.uniform(noise.sigma_min, noise.sigma_max)
            truth = as_floats(data.read(clip, first, frames, *draw_place()))
            return with_noise(truth, sigma, rng, params), truth
        case Bicubic() | BlurDown() as reduction:
            return _draw_reduced_crop(data, clip, first, params, reduction, rng)
        case MotionBlur() as blur:
            return exposures(as_floats(data.read(clip, first, frames, *draw_place())), blur.frames)
        case Recorded():
            place = draw_place()
            degraded, truth = (as_floats(data.read(clip, first, frames, *place, recorded=recorded)) for recorded in (True, False))
            return degraded, truth
        case Between():
            around, given = as_floats(data.read(clip, first, frames, *draw_place())), params.train.frames
            return around[::2], around[given - 1 : given]


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one of several processes trains on. Together, in the order of their ranks, they have all of it."""

    rank: int
    world: int
    """Processes."""

    def samples(self, batch_size: int) -> range:
        """Their indices within the global batch. Raises ValueError where the batch can't be shared out evenly."""
        if batch_size % self.world:
            remedy = "choose a number of processes that divides it"
            raise ValueError(f"train.batch_size {batch_size}: expected a multiple of the {self.world} processes that share it; {remedy}")
        count = batch_size // self.world
        return range(self.rank * count, (self.rank + 1) * count)


ALL = Share(0, 1)


def training_batch(data: PreparedData, params: Params, step: int, share: Share = ALL, reads: Reads | None = None) -> Batch:
    """The global batch of `step` (counted from 1), or a process's share of it."""
    reads = reads or Reads()
    samples = [training_sample(data, params, step, index, reads) for index in share.samples(params.train.batch_size)]
    return Batch(*(torch.stack(parts) for parts in zip(*samples)), skipped=tuple(reads.skipped))


def _draw_window(data: PreparedData, frames: int, rng: np.random.Generator) -> tuple[Clip, int]:
    """A training clip and the first frame of a window in it."""
    ends = np.cumsum(data.lengths("train") - frames + 1)
    window = int(rng.integers(ends[-1]))
    number = int(np.searchsorted(ends, window, side="right"))
    return data.clips("train")[number], window - (int(ends[number - 1]) if number else 0)


def _draw_reduced_crop(
    data: PreparedData, clip: Clip, first: int, params: Params, reduction: Bicubic | BlurDown, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A crop and its reduction, the same pixels as a crop of the reduced clip: it is reduced with the rows and columns around it."""
    side, scale = params.train.crop, reduction.scale
    reach = BICUBIC_REACH if isinstance(reduction, Bicubic) else blur_reach(scale, reduction.sigma)
    spans = []
    for size in (clip.height - clip.height % scale, clip.width - clip.width % scale):
        start = int(rng.integers((size - side) // scale + 1)) * scale
        outer = max(0, start - reach * scale)
        spans.append((start - outer, outer, min(size, start + side + reach * scale) - outer))
    (y, top, height), (x, left, width) = spans
    around = as_floats(data.read(clip, first, window_frames(params), top, left, height, width))
    degraded = reduced(around, reduction)[..., y // scale : (y + side) // scale, x // scale : (x + side) // scale]
    return degraded, around[..., y : y + side, x : x + side]


def _turn(clip: Tensor, turns: np.ndarray) -> Tensor:
    """One of the 8 flips and quarter turns of a square (D, C, S, S): left-right, upside down, transposed."""
    for turn, dims in zip(turns, ((-1,), (-2,))):
        clip = clip.flip(dims) if turn else clip
    return clip.transpose(-1, -2) if turns[2] else clip
