"""`vrt data import`: make a data set below `data/raw/` from a video, a folder of frames, or a copy of a published data set.

The source is copied as it is; the dataset.yaml beside it says which frames or clips belong to which split. Everything is
decoded once before, so that what is imported can also be prepared.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from vrt.data.clips import NAME, SPLITS, DataError
from vrt.data.dataset import RECORDED, SHARP
from vrt.data.decoding import expected_frames, image_frames, image_paths, paired, video_frames
from vrt.data.layouts import LAYOUTS, SourceClip, source_clips
from vrt.data.meta_info import Listed, chosen_clips, read_meta_info
from vrt.data.sources import ClipFrames, check_frames, copy_frames
from vrt.observe import log, progress

# Long enough for every published configuration but the 16-frame one, whose training split is far longer anyway.
MINIMUM_FRAMES = 8
# Parts of the source, in order; neighbouring frames are alike, so each split is one contiguous range.
VALIDATION_PART, TEST_PART = 0.1, 0.1
FRAMES_FOLDER = "frames"


def import_dataset(source: Path, name: str, raw_root: Path, layout: str | None = None, meta_info: Path | None = None) -> Path:
    """Copy a video, the images of a folder, or with `layout` a folder of many clips, into a new data set `raw_root`/`name`; returns that.

    One video or folder is split by its frames; the clips of a layout (`vrt.data.layouts`) as its publishers or its folders say, and with
    `meta_info` only the training clips that this list names (`vrt.data.meta_info`).

    Raises DataError for a name that is taken or odd, and for a source that is missing, empty, no video, damaged, too
    short, of changing frame size, or not of that layout; nothing is left behind then.
    """
    target = raw_root / name
    if not re.fullmatch(NAME, name):
        raise DataError(f"name {name!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit; choose another --name")
    if target.exists():
        raise DataError(f"{target}: expected a new data set, found an existing one; choose another --name or remove that folder")
    if not source.exists():
        raise DataError(f"{source}: expected a video or a folder of frames, found nothing; check the path")
    with _new_folder(target) as folder:
        imported = _import_clips(source, folder, layout, meta_info) if layout else _import_one(source, folder)
    log.info("imported %s into %s", imported, target)
    return target


def _import_one(source: Path, folder: Path) -> str:
    """What was imported, in words."""
    described, count = _import_frames(source, folder) if source.is_dir() else _import_video(source, folder)
    splits = split_frames(count, source)
    comment = f"Imported from {source.name!r}, {count} frames; ranges are [first frame, frame after the last]"
    _write_yaml(folder / "dataset.yaml", {**described, "splits": splits}, comment)
    return f"{count} frames: " + ", ".join(f"{split} {first} to {end - 1}" for split, [(first, end)] in splits.items())


def _import_clips(source: Path, folder: Path, layout: str, meta_info: Path | None) -> str:
    """What was imported, in words."""
    clips = source_clips(layout, source)
    listed = read_meta_info(meta_info) if meta_info else {}
    if meta_info:
        clips = chosen_clips(clips, listed, meta_info)
    with progress(f"importing {source.name}", len(clips), "clips") as bar:
        for clip in clips:
            if not re.fullmatch(NAME, clip.name):
                raise DataError(f"{clip.sharp}: expected a clip name of letters, digits, '.', '_' and '-', found {clip.name!r}; rename that folder")
            _copy_clip(clip, folder, listed.get(clip.name))
            bar.advance(clip=clip.name)
    parts = []
    for split in LAYOUTS[layout].splits:
        names = [clip.name for clip in clips if clip.split == split]
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        parts.append(f"{split} {len(names)}")
    recorded = clips[0].recorded is not None
    lists = " and ".join(f"{split}.txt" for split in LAYOUTS[layout].splits)
    comment = f"Imported from {source.name!r}, layout {layout}; {lists} name the clips of each split"
    _write_yaml(folder / "dataset.yaml", {"kind": "clips", "recorded": recorded}, comment)
    return f"{len(clips)} clips{' with their degraded frames' if recorded else ''}: {', '.join(parts)}"


def _copy_clip(clip: SourceClip, folder: Path, listed: Listed | None) -> None:
    """Copy it and decode the copy. Raises DataError where it is damaged, not as listed, or its degraded frames don't fit the sharp ones."""
    found = _brought(clip.sharp, folder / SHARP / clip.name)
    if listed is not None and found != listed:
        wanted, have = (f"{frames} frames of {height}x{width}" for frames, height, width in (listed, found))
        raise DataError(f"{clip.sharp}: expected {wanted} as the meta-info list says, found {have}; complete your copy, or correct the list")
    if clip.recorded is None:
        return
    folders = [place for place in (clip.sharp, clip.recorded) if isinstance(place, Path) and place.is_dir()]
    if len(folders) == 2:
        paired(*map(image_paths, folders))
    theirs = _brought(clip.recorded, folder / RECORDED / clip.name)
    if theirs[1:] != found[1:]:
        wanted, have = (f"{height}x{width}" for _, height, width in (found, theirs))
        raise DataError(f"{clip.recorded}: expected frames of the size of the sharp ones, {wanted}; found {have}; use pairs of one size")
    if theirs[0] != found[0]:
        raise DataError(f"{clip.recorded}: expected as many frames as sharp ones, {found[0]}; found {theirs[0]}; use pairs of one length")


def _brought(source: ClipFrames, target: Path) -> Listed:
    """Copy frames and decode all of them, where that can be done before: errors then name the user's own file."""
    if isinstance(source, Path):
        found = check_frames(source)
        copy_frames(source, target)
        return found
    try:
        return check_frames(copy_frames(source, target))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def split_frames(count: int, source: Path) -> dict[str, list[tuple[int, int]]]:
    """{split: [(first frame, frame after the last)]}: about 80 % for training, then 10 % for validation and 10 % for the test.

    Raises DataError where a split would have fewer than MINIMUM_FRAMES.
    """
    if count < 3 * MINIMUM_FRAMES:
        least = f"at least {3 * MINIMUM_FRAMES} frames ({MINIMUM_FRAMES} for each of {', '.join(SPLITS)})"
        raise DataError(f"{source}: expected {least}, found {count}; import a longer video")
    val, test = (max(MINIMUM_FRAMES, round(count * part)) for part in (VALIDATION_PART, TEST_PART))
    return {"train": [(0, count - val - test)], "val": [(count - val - test, count - test)], "test": [(count - test, count)]}


def _import_video(source: Path, folder: Path) -> tuple[dict[str, str], int]:
    """(what dataset.yaml says about the source, its number of frames)"""
    count = 0
    with progress(f"decoding {source.name}", expected_frames(source), "frames") as bar:
        for _ in video_frames(source):
            count += 1
            bar.advance()
    file = f"video{source.suffix}"
    shutil.copyfile(source, folder / file)
    return {"kind": "video", "file": file}, count


def _import_frames(source: Path, folder: Path) -> tuple[dict[str, str], int]:
    paths = image_paths(source)
    ignored = sum(1 for path in source.iterdir() if not path.name.startswith(".")) - len(paths)
    if ignored:
        log.warning("%s: ignoring %d entries that are no images", source, ignored)
    with progress(f"decoding {source.name}", len(paths), "frames") as bar:
        for _ in image_frames(paths):
            bar.advance()
    (folder / FRAMES_FOLDER).mkdir()
    for path in paths:
        shutil.copyfile(path, folder / FRAMES_FOLDER / path.name)
    return {"kind": "frames", "folder": FRAMES_FOLDER}, len(paths)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that gets its name `target` at the end of the block; an error or a kill leaves none of that name."""
    hidden = target.parent / f".{target.name}.new"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        hidden.rename(target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write_yaml(path: Path, content: dict, comment: str) -> None:
    yaml = YAML()
    yaml.default_flow_style = None  # ranges as [0, 80]
    text = StringIO()
    yaml.dump(content, text)
    path.write_text(f"# {comment}.\n{text.getvalue()}", encoding="utf-8")
