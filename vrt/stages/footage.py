"""What `vrt restore` reads, and where what it restored is kept until it is whole: a video, or a folder of pictures."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from PIL import Image

from vrt.checkpoint.serialize import sha256_of
from vrt.data.clips import DataError
from vrt.data.decoding import image_bits, image_frames, image_paths, video_frames
from vrt.data.video import VIDEOS, Footage, join, read_footage, write_segment


@dataclass(frozen=True)
class Source:
    """What is to be restored."""

    count: int
    """Frames."""
    deep: bool
    """More than 8 bits per channel: frames are uint16, else uint8."""
    frames: Callable[[], Iterator[np.ndarray]]
    """(H, W, 3), in order."""
    digest: str
    """Tells it from another one, or from itself after a change."""
    footage: Footage | None = None
    """None: pictures."""
    names: Sequence[str] = ()
    """Of the pictures, without endings."""


class Target(Protocol):
    """Where frames go that are made one piece after another; what was kept survives an interruption."""

    def keep(self, work: Path, first: int, frames: np.ndarray) -> None:
        """Keep frames, (D, H, W, 3), the first of which has that number."""

    def kept(self, work: Path) -> int:
        """How many frames are kept, from the first on without a gap."""

    def finish(self, work: Path, path: Path) -> None:
        """Make `path` of them all; it appears when it is whole."""


@dataclass(frozen=True)
class VideoTarget:
    """A video that is made piece by piece: each a file of its own until all are there."""

    footage: Footage
    suffix: str
    sound: Path
    """A file whose sound it gets."""

    def keep(self, work: Path, first: int, frames: np.ndarray) -> None:
        """One file per call, named by its first frame and the one after its last."""
        write_segment(work / f"{first:08d}-{first + len(frames):08d}{self.suffix}", frames, self.footage, first)

    def _segments(self, work: Path) -> list[Path]:
        return sorted(work.glob(f"[0-9]*-*{self.suffix}"))

    def kept(self, work: Path) -> int:
        """Frames of the files that follow one another without a gap."""
        done = 0
        for segment in self._segments(work):
            first, stop = map(int, segment.stem.split("-"))
            if first != done:
                break
            done = stop
        return done

    def finish(self, work: Path, path: Path) -> None:
        """Join the files, without coding them anew, and add the sound."""
        join(self._segments(work), self.sound, path)


UNFINISHED = "unfinished"


@dataclass(frozen=True)
class PictureTarget:
    """A folder of pictures."""

    names: Sequence[str]
    """One for each frame, without ending."""

    def keep(self, work: Path, first: int, frames: np.ndarray) -> None:
        """Each frame as a PNG, which has its name only once it is whole; until then it has one that no picture can have."""
        for name, pixels in zip(self.names[first:], frames):
            unfinished = work / UNFINISHED
            _write_png(unfinished, pixels)
            unfinished.replace(work / f"{name}.png")

    def kept(self, work: Path) -> int:
        """The number of the first picture that is missing."""
        return next((number for number, name in enumerate(self.names) if not (work / f"{name}.png").exists()), len(self.names))

    def finish(self, work: Path, path: Path) -> None:
        """Rename the folder they are in."""
        (work / UNFINISHED).unlink(missing_ok=True)
        work.rename(path)


def open_source(path: Path) -> Source:
    """The source, read through once where it is a video, so that damage shows before any work is done. Raises DataError."""
    if not path.is_dir():
        footage = read_footage(path)
        return Source(len(footage.ticks), footage.deep, lambda: video_frames(path, footage.deep, exact=True), sha256_of(path), footage)
    paths = image_paths(path)
    names = [picture.stem for picture in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: expected one picture of each name, found two called {twice}; restored, both would be {twice}.png")
    deep = any(image_bits(picture) > 8 for picture in paths)
    facts = [(picture.name, picture.stat().st_size, picture.stat().st_mtime_ns) for picture in paths]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    for _ in image_frames(paths, deep):
        pass
    return Source(len(paths), deep, lambda: image_frames(paths, deep), digest, names=names)


def open_target(source: Source, source_path: Path, target_path: Path, doubled: bool) -> Target:
    """Where frames of `source` go, with others half-way between them if `doubled`. Raises DataError for a name that no video has."""
    if source.footage is None:
        # Names have no room for pictures in between: all get numbers.
        names = [f"{number:08}" for number in range(2 * source.count - 1)] if doubled else source.names
        return PictureTarget(names)
    suffix = target_path.suffix.lower()
    if suffix not in VIDEOS:
        raise DataError(f"{target_path}: expected a name that ends in {', '.join(VIDEOS)} (.mkv is lossless), found {suffix or 'no ending'}")
    return VideoTarget(source.footage.doubled() if doubled else source.footage, suffix, source_path)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    if pixels.dtype == np.uint8:
        Image.fromarray(pixels).save(path, format="PNG")
        return
    # Pillow writes no colours of 16 bits.
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = pixels.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb48be", 1
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le").reformat(format="rgb48be")
    path.write_bytes(b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)]))
