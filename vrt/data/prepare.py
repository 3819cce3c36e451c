"""`vrt prepare`: make the clips of `data/prepared/` from what `data/raw/NAME/` describes.

The same input gives the same bytes. Sources are decoded as a stream: a long video is never in memory. Clips that lie in files of their own
are packed side by side, a process a core; after an interruption those that are finished are not packed again.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from vrt.data.clips import SPLITS, Clip, PreparedData, Split
from vrt.data.dataset import RECORDED, SHARP, Clips, Frames, FrameSplits, Synthetic, Video, clip_source, listed_clips, load_dataset
from vrt.data.decoding import decoded, expected_frames, image_frames, image_paths, is_video, paired, video_frames
from vrt.data.side_by_side import side_by_side
from vrt.data.synthetic import cut_regions, load_photographs, render_clip
from vrt.data.writing import Writer, pack_clip, writing
from vrt.observe import Bar, log, progress

# Longest clip: keeps validation of one clip within memory, and the clips of a long video even in length.
CLIP_FRAMES = 100


Decode = Callable[[], Iterator[np.ndarray]]
"""Begins to yield frames, each uint8 (H, W, 3), in whatever process calls it."""


@dataclass(frozen=True)
class RawClip:
    """A clip to be packed."""

    split: Split
    name: str
    frames: int
    pixels: Decode
    source: str
    """Stands for all it is made of."""
    recorded: Decode | None = None
    """The degraded frames recorded beside it, if the data set has some."""
    video: Path | None = None
    """A file that must be decoded to know how many frames it has; `frames` is what it promises."""


def prepare(raw: Path, prepared: Path) -> PreparedData:
    """Make `prepared` from the data set in the folder `raw`; an error or a kill leaves `prepared` as it was.

    Raises DataError or ParamsError, which name the file and what is wrong with it, or RuntimeError where a process was killed.
    """
    dataset = load_dataset(raw)
    with writing(prepared, raw.name) as writer:
        match dataset:
            case Video():
                _pack_video(writer, raw / dataset.file, dataset.splits)
            case Synthetic():
                _pack_all(writer, _synthetic_clips(dataset))
            case Frames():
                _pack_all(writer, _frame_clips(raw / dataset.folder, dataset.splits))
            case Clips():
                _pack_all(writer, _listed_clips(raw, dataset))
    data = PreparedData.open(prepared)
    size = sum(stored.bytes for clip in data.index.clips for stored in clip.files)
    log.info("prepared %d clips, %.1f MB, in %s; digest %s", len(data.index.clips), size / 1e6, prepared, data.digest[:12])
    return data


def raw_digest(raw: Path) -> str:
    """Stands for the files of a data set as they are now, and for the code that clips are made by."""
    return _digest(_facts(sorted(path for path in raw.rglob("*") if path.is_file())))


def _pack_video(writer: Writer, path: Path, splits: FrameSplits) -> None:
    """Cut the one stream of frames into clips, each named after its first frame."""
    frames, position = video_frames(path), 0
    with progress(f"preparing {path.name}", sum(end - first for _, first, end in splits.ordered()), "frames") as bar:
        for split, first, end in _pieces(splits):
            name, source = f"{first:06}", _digest([*_facts([path]), first, end])
            clip = writer.finished(split, name, source)
            if clip is None:
                wanted = islice(frames, first - position, end - position)
                clip, position = pack_clip(writer.folder, split, name, end - first, wanted, source=source), end
            _enter(writer, clip, bar)


def _pack_all(writer: Writer, clips: Iterator[RawClip]) -> None:
    """Pack clips that can each be decoded by itself."""
    clips = list(clips)
    with progress("preparing", sum(clip.frames for clip in clips), "frames") as bar:
        missing = []
        for clip in clips:
            finished = writer.finished(clip.split, clip.name, clip.source)
            if finished:
                _enter(writer, finished, bar)
            else:
                missing.append(clip)
        for clip in side_by_side(_packed, [(writer.folder, clip) for clip in missing], sum(clip.frames for clip in missing)):
            _enter(writer, clip, bar)


def _packed(folder: Path, clip: RawClip) -> Clip:
    frames = sum(1 for _ in decoded(clip.video)) if clip.video else clip.frames
    return pack_clip(folder, clip.split, clip.name, frames, clip.pixels(), clip.recorded() if clip.recorded else None, clip.source)


def _enter(writer: Writer, clip: Clip, bar: Bar) -> None:
    writer.enter(clip)
    bar.advance(clip.frames, clip=f"{clip.split}/{clip.name}")


def _synthetic_clips(dataset: Synthetic) -> Iterator[RawClip]:
    photographs = load_photographs()
    for split in SPLITS:
        settings = getattr(dataset.splits, split)
        regions = cut_regions(dataset, split, photographs)
        names = [name.split(".")[0] for name in settings.regions]
        for number in range(settings.clips):
            source = _digest([dataset.model_dump(mode="json"), split, number])
            pixels = functools.partial(render_clip, dataset, split, number, regions)
            yield RawClip(split, f"{names[number % len(names)]}-{number:02}", settings.frames, pixels, source)


def _frame_clips(folder: Path, splits: FrameSplits) -> Iterator[RawClip]:
    """Parts of one folder of images, each named after its first frame."""
    paths = image_paths(folder)
    for split, first, end in _pieces(splits):
        part = paths[first:end]
        yield RawClip(split, f"{first:06}", end - first, functools.partial(image_frames, part), _digest(_facts(part)))


def _listed_clips(raw: Path, dataset: Clips) -> Iterator[RawClip]:
    """Clips stay as long as they are: published tests measure whole ones."""
    for split, name in listed_clips(raw):
        places = [clip_source(raw / kind, name) for kind in ((SHARP, RECORDED) if dataset.recorded else (SHARP,))]
        files = [[place] if is_video(place) else image_paths(place) for place in places]
        if len(places) == 2 and not any(map(is_video, places)):
            paired(*files)
        decode = [
            functools.partial(video_frames, place) if is_video(place) else functools.partial(image_frames, of) for place, of in zip(places, files)
        ]
        video = places[0] if is_video(places[0]) else None
        frames = expected_frames(video) if video else len(files[0])
        yield RawClip(split, name, frames, decode[0], _digest(_facts(sum(files, []))), decode[1] if decode[1:] else None, video)


def _facts(paths: Iterable[Path]) -> list[list[str | int]]:
    """What tells files from others, or from themselves after a change, without reading them."""
    return [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]


def _digest(facts: list) -> str:
    return hashlib.sha256(json.dumps([_code(), facts]).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Stands for the code that clips are made by, this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _pieces(splits: FrameSplits) -> Iterator[tuple[Split, int, int]]:
    """(split, first frame, frame after the last) of each clip, in the order of the source; long ranges fall into even parts."""
    for split, first, end in splits.ordered():
        parts = -(-(end - first) // CLIP_FRAMES)
        cuts = [first + (end - first) * k // parts for k in range(parts + 1)]
        yield from ((split, a, b) for a, b in zip(cuts, cuts[1:]))
