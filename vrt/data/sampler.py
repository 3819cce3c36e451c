"""What a training step sees: a function of (seed, step, index within the global batch), and of nothing else.

There is no cursor, no epoch and no shuffled list, so neither a restart nor the number of workers changes a sample, and
a resumed training needs no fast-forward.

Legend: B clips, D frames, C channels, H height, W width of the ground truth, h, w of the degraded input.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vrt.data.clips import SPLITS, Clip, DataError, PreparedData
from vrt.data.degradations import BICUBIC_REACH, add_noise, bicubic_downsample
from vrt.params import Bicubic, Noise, Params

# Keeps these draws apart from all others that are made from the same seed and step.
STREAM = 0x_DA7A


@dataclass(frozen=True)
class Batch:
    degraded: Tensor
    """(B, D, C, h, w) float32. C is 3, or 4 with the noise level (sigma / 255, constant) last. Noise may leave [0, 1]."""
    truth: Tensor
    """(B, D, 3, H, W) float32 in [0, 1]."""


def check_sampling(data: PreparedData, params: Params) -> None:
    """Raises DataError where a training clip is smaller than a sample, or a split is empty."""
    for split in SPLITS:
        if not data.clips(split):
            raise DataError(f"{data.root}: expected clips in the split {split}, found none; add some to data/raw/{data.index.dataset}/dataset.yaml")
    wanted = params.train
    for clip in data.clips("train"):
        if clip.frames < wanted.frames:
            raise DataError(
                f"clip {clip}: expected at least train.frames = {wanted.frames} frames, found {clip.frames}; lower train.frames or use longer clips"
            )
        if min(clip.height, clip.width) < wanted.crop:
            raise DataError(
                f"clip {clip}: expected frames of at least train.crop = {wanted.crop} pixels, found {clip.height}x{clip.width}; "
                f"lower train.crop or use larger frames"
            )


def training_sample(data: PreparedData, params: Params, step: int, index: int) -> tuple[Tensor, Tensor]:
    """Sample `index` of the global batch of `step`: degraded (D, C, h, w) and truth (D, 3, H, W).

    Every window of train.frames frames of the training split is equally likely, and every crop position in it, every
    flip and quarter turn, and every noise level from sigma_min to sigma_max.
    Raises DataError, which names step and clip.
    """
    rng = np.random.default_rng([params.seed, STREAM, step, index])
    clip, first = _draw_window(data.clips("train"), params.train.frames, rng)
    try:
        match params.degradation:
            case Noise() as noise:
                sigma = rng.uniform(noise.sigma_min, noise.sigma_max)
                top, left = (int(rng.integers(size - params.train.crop + 1)) for size in (clip.height, clip.width))
                truth = _floats(data.read(clip, first, params.train.frames, top, left, params.train.crop, params.train.crop))
                degraded = _noisy(truth, sigma, rng, params)
            case Bicubic(scale=scale):
                degraded, truth = _draw_reduced_crop(data, clip, first, params, scale, rng)
    except DataError as error:
        raise DataError(f"step {step}, sample {index}, clip {clip}: {error}") from error
    turns = rng.integers(2, size=3)
    return _turn(degraded, turns), _turn(truth, turns)


def training_batch(data: PreparedData, params: Params, step: int) -> Batch:
    """The global batch of `step` (counted from 1)."""
    samples = [training_sample(data, params, step, index) for index in range(params.train.batch_size)]
    return Batch(*(torch.stack(parts) for parts in zip(*samples)))


def training_batches(data: PreparedData, params: Params, first_step: int, last_step: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch) for each step from `first_step` to `last_step`, both included, made by params.data.workers processes.

    Raises DataError: at once where clips are too small, later where a clip can't be read (it names step and clip).
    If a worker is killed, torch raises a RuntimeError that says so, wherever the trainer is then.
    """
    check_sampling(data, params)
    steps = range(first_step, last_step + 1)
    if params.data.workers == 0:
        return ((step, training_batch(data, params, step)) for step in steps)
    return _batches_from_workers(data, params, steps)


def evaluation_clip(data: PreparedData, params: Params, clip: Clip) -> Batch:
    """A whole clip (B = 1), degraded in the same way whenever and by whomever it is evaluated.

    The noise depends on the clip's name alone, not on the training's seed, so that trainings compare. For a reduction the
    bottom and right rest of height and width that do not divide by the scale are cut off.
    """
    match params.degradation:
        case Noise() as noise:
            truth = _floats(data.read_whole(clip))
            name = hashlib.sha256(clip.file.encode()).digest()
            rng = np.random.default_rng(list(name))
            degraded = _noisy(truth, noise.sigma_test, rng, params)
        case Bicubic(scale=scale):
            height, width = (size - size % scale for size in (clip.height, clip.width))
            truth = _floats(data.read(clip, 0, clip.frames, 0, 0, height, width))
            degraded = _reduced(truth, scale)
    return Batch(degraded[None], truth[None])


class _Steps:
    """The data set that a DataLoader sees: indexed by step."""

    def __init__(self, data: PreparedData, params: Params):
        self._data, self._params = data, params

    def __getitem__(self, step: int) -> tuple[int, Batch]:
        return step, training_batch(self._data, self._params, step)


def _batches_from_workers(data: PreparedData, params: Params, steps: range) -> Iterator[tuple[int, Batch]]:
    loader = DataLoader(
        _Steps(data, params),
        batch_size=None,
        sampler=steps,
        num_workers=params.data.workers,
        prefetch_factor=2,
        worker_init_fn=_leave_process_group,
        # A forked child of a process with threads (the checkpoint writer) can hang.
        multiprocessing_context="spawn",
        # The loader draws a seed that nothing uses; not from the trainer's generator.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    try:
        yield from batches
    finally:
        # Left to the garbage collector, workers would live for as long as the traceback of an error.
        batches._shutdown_workers()


def _leave_process_group(_worker: int) -> None:
    # A signal to the whole group asks the trainer to finish its step and save, which it can't do without its workers.
    # They end with it all the same: it tells them to, and they watch whether it lives.
    os.setpgrp()


def _draw_window(clips: tuple[Clip, ...], frames: int, rng: np.random.Generator) -> tuple[Clip, int]:
    """A clip and the first frame of a window in it."""
    ends = np.cumsum([clip.frames - frames + 1 for clip in clips])
    window = int(rng.integers(ends[-1]))
    number = int(np.searchsorted(ends, window, side="right"))
    return clips[number], window - (int(ends[number - 1]) if number else 0)


def _draw_reduced_crop(data: PreparedData, clip: Clip, first: int, params: Params, scale: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A crop and its reduction, the same pixels as a crop of the reduced clip: it is reduced with the rows and columns around it."""
    side = params.train.crop
    spans = []
    for size in (clip.height - clip.height % scale, clip.width - clip.width % scale):
        start = int(rng.integers((size - side) // scale + 1)) * scale
        outer = max(0, start - BICUBIC_REACH * scale)
        spans.append((start - outer, outer, min(size, start + side + BICUBIC_REACH * scale) - outer))
    (y, top, height), (x, left, width) = spans
    around = _floats(data.read(clip, first, params.train.frames, top, left, height, width))
    degraded = _reduced(around, scale)[..., y // scale : (y + side) // scale, x // scale : (x + side) // scale]
    return degraded, around[..., y : y + side, x : x + side]


def _reduced(truth: Tensor, scale: int) -> Tensor:
    """Rounded to 8 bits, as the low-resolution frames of published data sets (and of users) are stored."""
    return (bicubic_downsample(truth, scale) * 255).round().clamp(0, 255) / 255


def _noisy(truth: Tensor, sigma: float, rng: np.random.Generator, params: Params) -> Tensor:
    noisy = add_noise(truth, sigma, rng)
    if not params.network.nonblind_denoising:
        return noisy
    return torch.cat([noisy, torch.full_like(truth[:, :1], sigma / 255)], dim=1)


def _floats(pixels: np.ndarray) -> Tensor:
    """uint8 (D, H, W, 3) -> float32 (D, 3, H, W) in [0, 1]"""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def _turn(clip: Tensor, turns: np.ndarray) -> Tensor:
    """One of the 8 flips and quarter turns of a square (D, C, S, S): left-right, upside down, transposed."""
    for turn, dims in zip(turns, ((-1,), (-2,))):
        clip = clip.flip(dims) if turn else clip
    return clip.transpose(-1, -2) if turns[2] else clip
