"""Video files and folders of images as streams of frames: uint8 (H, W, 3), RGB, the way up they are meant to be seen."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vrt.data.clips import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
REPAIR = "get an undamaged copy, or re-encode it"


def image_paths(folder: Path) -> list[Path]:
    """The images of a folder in natural order of their names (frame2 before frame10).

    Raises DataError where there are none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of frames, found none; import one with `vrt data import`")
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not found:
        raise DataError(f"{folder}: expected frames ({', '.join(IMAGE_SUFFIXES)}), found none; export the video's frames as PNG there")
    return sorted(found, key=_natural)


def paired(sharp: list[Path], recorded: list[Path]) -> list[Path]:
    """`recorded`, once it is sure that each belongs to the sharp image at the same place: their names agree up to the suffix.

    Raises DataError, which names the first that has no counterpart, or the folder where a name comes twice.
    """
    names = {path.stem for path in sharp}, {path.stem for path in recorded}
    for paths, others, folder in ((sharp, names[1], recorded[0].parent), (recorded, names[0], sharp[0].parent)):
        alone = next((path for path in paths if path.stem not in others), None)
        if alone:
            raise DataError(f"{alone}: expected a frame {alone.stem} in {folder} too, found none; add it there, or remove this one")
    if len(sharp) != len(recorded):
        folder = max(sharp, recorded, key=len)[0].parent
        raise DataError(f"{folder}: expected one frame of each name, found {len(sharp)} sharp and {len(recorded)} degraded ones; remove the copies")
    return recorded


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"\d+|\D+", path.name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def image_frames(paths: list[Path]) -> Iterator[np.ndarray]:
    """Raises DataError for an image that can't be read or whose size differs from the first's."""
    yield from _same_size((path, _read_image(path)) for path in paths)


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                raise DataError(f"{path}: expected 8 bits per channel, found a 16-bit grey image; convert the frames to 8-bit RGB")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: expected an image, found a file that can't be read ({error}); replace it or take it out") from None


def video_frames(path: Path) -> Iterator[np.ndarray]:
    """All frames of a file's first video stream.

    Raises DataError where it is no video, is cut off or damaged, or changes its frame size.
    """
    yield from _same_size((path, frame) for frame in _decode(path))


def expected_frames(path: Path) -> int:
    """How many frames the file says it has; 0 where it does not say, and not always right. Raises DataError where it is no video."""
    with _opened(path) as stream:
        return _promised(stream)


def _decode(path: Path) -> Iterator[np.ndarray]:
    count = 0
    with _opened(path) as stream:
        for frame in stream.container.decode(stream):
            if frame.is_corrupt:
                raise DataError(f"{path}: expected a sound video, found damage in frame {count}; {REPAIR}")
            yield _upright(frame)
            count += 1
        promised = _promised(stream)
    # Matroska files are cut off without any decoding error. A few frames less are normal, though: edit lists hide
    # frames, and a variable frame rate makes the number a guess.
    if promised - count > max(3, promised // 50):
        raise DataError(f"{path}: expected {promised} frames, found {count}; the file is cut off: {REPAIR}")


@contextmanager
def _opened(path: Path) -> Iterator[av.VideoStream]:
    """The first video stream of a file, with whatever goes wrong inside the block as a DataError."""
    if not path.is_file():
        raise DataError(f"{path}: expected a video, found no such file; import it again with `vrt data import`")
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DataError(f"{path}: expected a video, found a file without a picture stream; choose another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield stream
    except av.FFmpegError as error:
        raise DataError(f"{path}: expected a video, found a file that can't be decoded ({error.strerror}); {REPAIR}") from None


def _promised(stream: av.VideoStream) -> int:
    """The number of frames by the container's own account; 0 where it gives none."""
    if stream.frames:
        return stream.frames
    seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", stream.metadata.get("DURATION", ""))
    if tag:
        seconds = sum(float(part) * unit for part, unit in zip(tag.groups(), (3600, 60, 1)))
    return round(seconds * float(stream.guessed_rate or 0))


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """uint8 (H, W, 3), turned as the file's rotation (degrees counterclockwise) says."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _same_size(frames: Iterable[tuple[Path, np.ndarray]]) -> Iterator[np.ndarray]:
    shape = None
    for count, (path, frame) in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            wanted, found = (f"{height}x{width}" for height, width, _ in (shape, frame.shape))
            raise DataError(f"{path}: expected frames of one size, {wanted} as in frame 0; found {found} in frame {count}; cut or scale the source")
        yield frame
