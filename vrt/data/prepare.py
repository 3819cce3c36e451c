"""`vrt prepare`: make the clips of `data/prepared/` from what `data/raw/NAME/` describes.

The same input gives the same bytes. Sources are decoded as a stream: a long video is never in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from vrt.data.clips import SPLITS, PreparedData, Split, writing
from vrt.data.dataset import RECORDED, SHARP, Clips, Dataset, Frames, FrameSplits, Synthetic, listed_clips, load_dataset
from vrt.data.decoding import image_frames, image_paths, paired, video_frames
from vrt.data.synthetic import cut_regions, load_photographs, render_clip
from vrt.observe import log, progress

# Longest clip: keeps validation of one clip within memory, and the clips of a long video even in length.
CLIP_FRAMES = 100


@dataclass(frozen=True)
class RawClip:
    """A clip to be stored; `pixels` yields `frames` frames, each uint8 (H, W, 3), and must be used up before the next clip."""

    split: Split
    name: str
    frames: int
    pixels: Iterator[np.ndarray]
    recorded: Iterator[np.ndarray] | None = None
    """The degraded frames recorded beside them, if the data set has some."""


def prepare(raw: Path, prepared: Path) -> PreparedData:
    """Make `prepared` from the data set in the folder `raw`; an error or a kill leaves `prepared` as it was.

    Raises DataError or ParamsError, which name the file and what is wrong with it.
    """
    dataset = load_dataset(raw)
    with progress(f"preparing {raw.name}", _frame_count(raw, dataset), "frames") as bar, writing(prepared, raw.name) as writer:
        for clip in _raw_clips(raw, dataset):
            writer.add(clip.split, clip.name, clip.frames, clip.pixels, clip.recorded)
            bar.advance(clip.frames, clip=f"{clip.split}/{clip.name}")
    data = PreparedData.open(prepared)
    size = sum(stored.bytes for clip in data.index.clips for stored in clip.files)
    log.info("prepared %d clips, %.1f MB, in %s; digest %s", len(data.index.clips), size / 1e6, prepared, data.digest[:12])
    return data


def _raw_clips(raw: Path, dataset: Dataset) -> Iterator[RawClip]:
    match dataset:
        case Synthetic():
            yield from _synthetic_clips(dataset)
        case Frames():
            yield from _cut(image_frames(image_paths(raw / dataset.folder)), dataset.splits)
        case Clips():
            yield from _listed_clips(raw, dataset)
        case _:
            yield from _cut(video_frames(raw / dataset.file), dataset.splits)


def _synthetic_clips(dataset: Synthetic) -> Iterator[RawClip]:
    photographs = load_photographs()
    for split in SPLITS:
        settings = getattr(dataset.splits, split)
        regions = cut_regions(dataset, split, photographs)
        names = [name.split(".")[0] for name in settings.regions]
        for number in range(settings.clips):
            frames = render_clip(dataset, split, number, regions)
            yield RawClip(split, f"{names[number % len(names)]}-{number:02}", settings.frames, frames)


def _listed_clips(raw: Path, dataset: Clips) -> Iterator[RawClip]:
    """Clips stay as long as they are: published tests measure whole ones."""
    for split, name in listed_clips(raw):
        sharp = image_paths(raw / SHARP / name)
        recorded = image_frames(paired(sharp, image_paths(raw / RECORDED / name))) if dataset.recorded else None
        yield RawClip(split, name, len(sharp), image_frames(sharp), recorded)


def _cut(frames: Iterator[np.ndarray], splits: FrameSplits) -> Iterator[RawClip]:
    """Cut a stream of frames into the clips of its splits, each named after its first frame."""
    position = 0
    for split, first, end in _pieces(splits):
        wanted = islice(frames, first - position, end - position)
        position = end
        yield RawClip(split, f"{first:06}", end - first, wanted)


def _pieces(splits: FrameSplits) -> Iterator[tuple[Split, int, int]]:
    """(split, first frame, frame after the last) of each clip, in the order of the source; long ranges fall into even parts."""
    for split, first, end in splits.ordered():
        parts = -(-(end - first) // CLIP_FRAMES)
        cuts = [first + (end - first) * k // parts for k in range(parts + 1)]
        yield from ((split, a, b) for a, b in zip(cuts, cuts[1:]))


def _frame_count(raw: Path, dataset: Dataset) -> int:
    if isinstance(dataset, Synthetic):
        return sum(getattr(dataset.splits, split).clips * getattr(dataset.splits, split).frames for split in SPLITS)
    if isinstance(dataset, Clips):
        return sum(len(image_paths(raw / SHARP / name)) for _, name in listed_clips(raw))
    return sum(end - first for _, first, end in dataset.splits.ordered())
