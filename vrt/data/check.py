"""`vrt data check`: what is there of a data set, what is missing, what is damaged; every frame is decoded, before any GPU is paid for."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vrt.data.clips import SPLITS, PreparedData, Split
from vrt.data.dataset import RECORDED, SHARP, Clips, Frames, Synthetic, Video, clip_source, listed_clips, load_dataset
from vrt.data.decoding import expected_frames, image_frames, image_paths, is_video, paired, video_frames
from vrt.data.errors import DataError
from vrt.data.layouts import source_clips
from vrt.data.sampler import least_frames
from vrt.data.side_by_side import side_by_side
from vrt.data.sources import ClipFrames, LmdbClip, Quintuplet, copy_frames, lmdb_names
from vrt.observe import progress
from vrt.params import Params, Recorded


@dataclass(frozen=True)
class Found:
    """What was found of one clip, or of a whole video."""

    split: Split | None
    """None: it is cut into all of them."""
    name: str
    frames: int
    """Sound ones."""
    sizes: tuple[tuple[int, int], ...]
    """Heights and widths that occur."""
    recorded: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A clip that is to be looked at."""

    split: Split | None
    name: str
    sharp: ClipFrames
    recorded: ClipFrames | None = None


def check_raw(raw: Path) -> list[Found]:
    """Decode all of a data set below data/raw/. Raises DataError or ParamsError where its description is wrong or nothing is listed."""
    dataset = load_dataset(raw)
    match dataset:
        case Synthetic():
            splits = [(split, getattr(dataset.splits, split)) for split in SPLITS]
            return [Found(split, "synthetic", s.clips * s.frames, ((s.height, s.width),), False, ()) for split, s in splits]
        case Video():
            parts = [Part(None, dataset.file, raw / dataset.file)]
        case Frames():
            parts = [Part(None, dataset.folder, raw / dataset.folder)]
        case Clips():
            return _check_listed(raw, dataset)
    (found,) = _looked_at(parts)
    last = max(end for _, _, end in dataset.splits.ordered())
    if found.frames < last and not found.problems:
        problem = f"{raw / 'dataset.yaml'}: expected {last} frames for its ranges, found {found.frames}; correct the ranges"
        return [replace(found, problems=(problem,))]
    return [found]


def _check_listed(raw: Path, dataset: Clips) -> list[Found]:
    parts, missing = [], []
    for split, name in listed_clips(raw):
        try:
            sharp = clip_source(raw / SHARP, name)
            parts.append(Part(split, name, sharp, clip_source(raw / RECORDED, name) if dataset.recorded else None))
        except DataError as error:
            missing.append(Found(split, name, 0, (), False, (str(error),)))
    return missing + _looked_at(parts)


def check_copy(folder: Path, layout: str) -> list[Found]:
    """Decode all of a copy of a published data set, before it is imported. Raises DataError where its layout is another."""
    return _looked_at([Part(clip.split, clip.name, clip.sharp, clip.recorded) for clip in source_clips(layout, folder)])


def _looked_at(parts: list[Part]) -> list[Found]:
    frames = [_expected(part) for part in parts]
    found = []
    with progress("decoding", sum(frames), "frames") as bar:
        expected = {(part.split, part.name): count for part, count in zip(parts, frames)}
        for one in side_by_side(_look, [(part,) for part in parts], sum(frames)):
            found.append(one)
            bar.advance(expected[one.split, one.name], clip=one.name)
    return sorted(found, key=lambda one: (SPLITS.index(one.split) if one.split else 0, one.name))


def _expected(part: Part) -> int:
    """Frames by what names and headers say, for the progress bar; what is wrong with them is told by `_look`."""
    try:
        return sum(_count(source) for source in (part.sharp, part.recorded) if source)
    except DataError:
        return 0


def _count(source: ClipFrames) -> int:
    match source:
        case LmdbClip():
            return len(lmdb_names(source))
        case Quintuplet():
            return len(source.images())
        case _:
            return expected_frames(source) if is_video(source) else len(image_paths(source))


def _look(part: Part) -> Found:
    """Decode one clip to its end, whatever is wrong on the way."""
    problems: list[str] = []
    counts, sizes = [], set()
    for source in (part.sharp, part.recorded) if part.recorded else (part.sharp,):
        count = 0
        for shape in _shapes(source, problems):
            count += 1
            sizes.add(shape)
        counts.append(count)
    if len(sizes) > 1 and not problems:
        listed = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        problems.append(f"{part.sharp}: expected frames of one size, found {listed}; cut or scale the source")
    folders = [source for source in (part.sharp, part.recorded) if isinstance(source, Path) and source.is_dir()]
    if len(folders) == 2 and not problems:
        try:
            paired(*map(image_paths, folders))
        except DataError as error:
            problems.append(str(error))
    if len(set(counts)) > 1 and not problems:
        problems.append(f"{part.recorded}: expected as many frames as sharp ones, {counts[0]}, found {counts[1]}; use pairs of one length")
    return Found(part.split, part.name, counts[0], tuple(sorted(sizes)), part.recorded is not None, tuple(problems))


def _shapes(source: ClipFrames, problems: list[str]) -> Iterator[tuple[int, int]]:
    """(height, width) of each sound frame; what is wrong with the others goes to `problems`."""
    try:
        if isinstance(source, Path) and is_video(source):
            yield from (frame.shape[:2] for frame in video_frames(source))
            return
        if isinstance(source, LmdbClip):
            with tempfile.TemporaryDirectory() as scratch:
                yield from _shapes(copy_frames(source, Path(scratch) / "clip"), problems)
            return
        paths = source.images() if isinstance(source, Quintuplet) else image_paths(source)
    except DataError as error:
        problems.append(str(error))
        return
    for path in paths:
        try:
            yield from (frame.shape[:2] for frame in image_frames([path]))
        except DataError as error:
            problems.append(str(error))


def check_params(found: list[Found], params: Params) -> list[str]:
    """What of a data set is too small or missing for the params file's training."""
    problems = []
    for split in SPLITS:
        if not any(one.split in (split, None) for one in found):
            problems.append(f"expected clips in the split {split}, found none; a training needs all of {', '.join(SPLITS)}")
    crop = params.train.crop
    for one in found:
        if isinstance(params.degradation, Recorded) and not one.recorded:
            problems.append(f"clip {one.name}: expected degraded frames recorded beside it, found none; choose another degradation.kind")
        wanted = least_frames(params, one.split) if one.split else 0
        if one.frames < wanted:
            problems.append(f"clip {one.name}: expected at least {wanted} frames, found {one.frames}; lower train.frames or use longer clips")
        for height, width in one.sizes if one.split in ("train", None) else ():
            if min(height, width) < crop:
                found_size = f"found {height}x{width}; lower train.crop or use larger frames"
                problems.append(f"clip {one.name}: expected frames of at least train.crop = {crop} pixels, {found_size}")
    return problems


def check_prepared(prepared: Path) -> list[str]:
    """What is wrong with the prepared clips, where there are some."""
    if not prepared.exists():
        return []
    try:
        return list(PreparedData.open(prepared).problems())
    except DataError as error:
        return [str(error)]


def show(title: str, found: list[Found], problems: list[str]) -> bool:
    """Print what there is, and every problem. True: there is none."""
    table = Table(title=title, title_justify="left")
    for heading in ("split", "clips", "frames", "sizes", "pairs", "with problems"):
        table.add_column(heading, justify="left" if heading in ("split", "sizes") else "right")
    for split in (*SPLITS, None):
        of_split = [one for one in found if one.split == split]
        if of_split:
            sizes = sorted({size for one in of_split for size in one.sizes})
            shown = ", ".join(f"{height}x{width}" for height, width in sizes[:3]) + (f" and {len(sizes) - 3} more" if sizes[3:] else "")
            counts = (
                len(of_split),
                sum(one.frames for one in of_split),
                sum(one.recorded for one in of_split),
                sum(bool(one.problems) for one in of_split),
            )
            table.add_row(split or "all", str(counts[0]), str(counts[1]), shown, str(counts[2]), str(counts[3]))
    console = Console()
    console.print(table)
    told = [problem for one in found for problem in one.problems] + problems
    for problem in told:
        console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(told)} problems: see above" if told else "nothing is missing or damaged", style="bold red" if told else "bold green")
    return not told
