"""The forms in which the frames of a clip lie in a user's copy of a data set, and how each is brought into `data/raw/`."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vrt.data.decoding import image_frames, image_paths, is_video, video_frames
from vrt.data.errors import DataError

REPACK = "make the LMDB again, or import from the folders of frames it was made of"


@dataclass(frozen=True)
class LmdbClip:
    """A clip of an LMDB as BasicSR and KAIR write it: encoded images under keys CLIP/NAME, listed in its meta_info.txt."""

    lmdb: Path
    clip: str

    def __str__(self) -> str:
        return f"{self.lmdb}, clip {self.clip}"


@dataclass(frozen=True)
class Quintuplet:
    """A folder of a test set for frame interpolation: frame0, frame1, frame2 and frame3 are given, framet is to be made between 1 and 2."""

    folder: Path

    def images(self) -> list[Path]:
        """As a clip of seven frames, of which every second is given. Nothing looks at the second and the sixth, which nobody published.

        Raises DataError where one of the five images is missing.
        """
        paths = {path.stem: path for path in image_paths(self.folder)}
        missing = [name for name in ("frame0", "frame1", "framet", "frame2", "frame3") if name not in paths]
        if missing:
            raise DataError(
                f"{self.folder}: expected the images frame0, frame1, framet, frame2 and frame3, found no {missing[0]}; complete your copy"
            )
        return [paths[f"frame{name}"] for name in ("0", "0", "1", "t", "2", "3", "3")]

    def __str__(self) -> str:
        return str(self.folder)


ClipFrames = Path | LmdbClip | Quintuplet
"""A folder of images, a video file, or one of the above."""


def lmdb_clips(lmdb: Path) -> dict[str, LmdbClip]:
    """The clips of an LMDB, by their names."""
    return {clip: LmdbClip(lmdb, clip) for clip in _meta_info(lmdb)}


@cache
def _meta_info(lmdb: Path) -> dict[str, list[str]]:
    """{clip: names of its images} of an LMDB, from lines such as `000/00000000.png (720,1280,3) 1`. Raises DataError."""
    path = lmdb / "meta_info.txt"
    if not path.is_file() or not (lmdb / "data.mdb").is_file():
        raise DataError(f"{lmdb}: expected an LMDB with data.mdb and meta_info.txt, found another folder; {REPACK}")
    clips: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            found = re.match(r"(\S+)/([^/\s]+\.[a-z]+) \(\d+,\d+,\d+\)", line)
            if not found:
                raise DataError(f"{path}, line {number}: expected CLIP/NAME.png (height,width,channels), found {line[:60]!r}; {REPACK}")
            clips.setdefault(found[1], []).append(found[2])
    return clips


@contextmanager
def _reading(lmdb: Path) -> Iterator:
    import lmdb as library  # only who imports from one needs it

    try:
        with library.open(str(lmdb), readonly=True, lock=False, readahead=False) as environment, environment.begin() as transaction:
            yield transaction
    except library.Error as error:
        raise DataError(f"{lmdb}: expected an LMDB, found a damaged one ({error}); {REPACK}") from None


def lmdb_images(source: LmdbClip) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of each frame of a clip. Raises DataError where one is missing."""
    with _reading(source.lmdb) as stored:
        for name in lmdb_names(source):
            key = f"{source.clip}/{Path(name).stem}"
            content = stored.get(key.encode())
            if content is None:
                raise DataError(f"{source.lmdb}: expected the image {key} that meta_info.txt lists, found none; {REPACK}")
            yield name, content


def lmdb_names(source: LmdbClip) -> list[str]:
    """The file names of a clip's frames, as the list in its LMDB has them. Raises DataError where that can't be read."""
    return _meta_info(source.lmdb)[source.clip]


def copy_frames(source: ClipFrames, target: Path) -> Path:
    """Bring a clip's frames in unchanged, below the name `target`; a video file keeps its ending. Returns what was made."""
    match source:
        case LmdbClip():
            target.mkdir(parents=True)
            for name, content in lmdb_images(source):
                (target / name).write_bytes(content)
        case Quintuplet():
            target.mkdir(parents=True)
            for number, path in enumerate(source.images()):
                shutil.copyfile(path, target / f"{number}{path.suffix}")
        case Path() if is_video(source):
            target.parent.mkdir(parents=True, exist_ok=True)
            target = target.with_name(target.name + source.suffix.lower())
            shutil.copyfile(source, target)
        case Path():
            images = image_paths(source)
            target.mkdir(parents=True)
            for path in images:
                shutil.copyfile(path, target / path.name)
    return target


def check_frames(copied: Path) -> tuple[int, int, int]:
    """(frames, height, width) of a folder of images or a video file, all decoded. Raises DataError."""
    frames = video_frames(copied) if is_video(copied) else image_frames(image_paths(copied))
    count, shape = 0, (0, 0)
    for frame in frames:
        count, shape = count + 1, frame.shape
    return count, *shape[:2]
