"""One clip as one file, packed so that a crop of some frames is read without decoding whole pictures, and without loss.

The file is a Blosc2 array (D, H, W) of pixels, cut into blocks of one frame and BLOCK x BLOCK pixels, each decoded by itself. Red and
blue are stored as their difference from green, which they follow in most pictures: that saves a fifth (docs/measured.md has the candidates).

D frames, H height, W width. Frames are uint8 (H, W, 3), RGB.
"""

import functools
import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from vrt.data.errors import DataError

SUFFIX = ".b2nd"
BLOCK = 64
PIXEL = np.dtype([(colour, "u1") for colour in ("red_less_green", "green", "blue_less_green")])
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Packed:
    """What is known of a file once it is written."""

    shape: Shape
    """Of one frame."""
    bytes: int
    sha256: str
    """Of the file."""
    pixels: str
    """SHA-256 (hex) of the frames themselves, as an .npy file: the same however they are packed."""


def pack(path: Path, clip: str, frames: int, pixels: Iterable[np.ndarray], shape: Shape | None = None) -> Packed:
    """Write a clip of `frames` frames, of which one at a time is held; `path` appears when it is whole. The same frames give the same bytes.

    Raises DataError, which names `clip`, where `pixels` has another number of frames, or frames of changing size (or other than `shape`).
    """
    stream = iter(pixels)
    first = next(stream, None)
    if first is None:
        raise DataError(f"clip {clip}: expected {frames} frames, found none; check the frame ranges in dataset.yaml")
    shape = shape or first.shape
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{SUFFIX}")
    digest, count = hashlib.sha256(npy_header((frames, *shape))), 0
    try:
        array = _new_array(unfinished, (frames, *shape[:2]))
        for count, frame in enumerate(chain([first], stream), start=1):
            if frame.shape != shape or frame.dtype != np.uint8:
                found = f"found {frame.dtype} {frame.shape} in frame {count}"
                raise DataError(f"clip {clip}: expected each frame as uint8 {shape}, {found}; cut the source there")
            if count > frames:
                break
            digest.update(np.ascontiguousarray(frame))
            array[count - 1 : count] = _differences(frame)
        if count != frames:
            found = f"more than {frames}" if count > frames else str(count)
            raise DataError(f"clip {clip}: expected {frames} frames, found {found}; check the frame ranges in dataset.yaml")
        packed = Packed(shape, unfinished.stat().st_size, _sha256(unfinished), digest.hexdigest())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return packed


def read_part(path: Path, sha256: str, shape: tuple[int, ...], part: tuple[slice, slice, slice]) -> np.ndarray:
    """Frames, rows and columns of a clip of `shape`, (D, H, W, 3): uint8, a copy of its own.

    A file is compared with its digest when a process reads it for the first time: Blosc2 decodes damage without noticing.
    Raises DataError where it differs, is not there, or holds something else.
    """
    _check_once(path, sha256)
    try:
        array = _opened(path)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{path}: expected a packed clip, found a file that can't be read ({error})") from None
    if (*array.shape, 3) != shape or array.dtype != PIXEL:
        raise DataError(f"{path}: expected pixels of shape {shape}, found {array.dtype} {array.shape}")
    return _colours(array[part])


def check_digest(path: Path, sha256: str) -> None:
    """Raises DataError where the file differs from its digest."""
    try:
        found = _sha256(path)
    except OSError as error:
        raise DataError(f"{path}: expected a packed clip, found a file that can't be read ({error.strerror})") from None
    if found != sha256:
        raise DataError(f"{path}: expected SHA-256 {sha256[:12]}..., found {found[:12]}...; the file has changed")


def _check_once(path: Path, sha256: str) -> None:
    try:
        file = path.stat()
    except OSError:
        check_digest(path, sha256)
        raise
    _checked(path, sha256, file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns)


@functools.cache
def _checked(path: Path, sha256: str, *_which: int) -> None:
    """Remembers, for this process, which files do not differ: another one in a file's place, such as after preparing anew, is looked at."""
    check_digest(path, sha256)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The start of an .npy file that holds uint8 of that shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _new_array(path: Path, shape: Shape):
    import blosc2  # half a second, and the command line has no use for it

    # One thread: several write the blocks of a frame in whatever order they finish. The first level: the next four save nothing.
    storing = blosc2.CParams(
        codec=blosc2.Codec.ZSTD,
        clevel=1,
        filters=[blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA],
        filters_meta=[0, PIXEL.itemsize],
        typesize=PIXEL.itemsize,
        nthreads=1,
    )
    _, height, width = shape
    blocks = (1, min(BLOCK, height), min(BLOCK, width))
    return blosc2.empty(shape, dtype=PIXEL, chunks=(1, height, width), blocks=blocks, cparams=storing, urlpath=str(path), mode="w")


def _opened(path: Path):
    import blosc2

    # One thread: loaders run side by side, one a core.
    return blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))


def _differences(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> PIXEL (1, H, W); differences are modulo 256, so nothing is lost."""
    stored = np.empty((1, *frame.shape[:2]), PIXEL)
    stored["green"] = frame[..., 1]
    stored["red_less_green"] = frame[..., 0] - frame[..., 1]
    stored["blue_less_green"] = frame[..., 2] - frame[..., 1]
    return stored


def _colours(stored: np.ndarray) -> np.ndarray:
    """PIXEL (D, H, W) -> uint8 (D, H, W, 3), in the same memory."""
    frames = stored.view(np.uint8).reshape(*stored.shape, 3)
    frames[..., 0] += frames[..., 1]
    frames[..., 2] += frames[..., 1]
    return frames
