"""Video files and folders of images as streams of frames: (H, W, 3), RGB, the way up they are meant to be seen.

uint8; or, where the caller asks for `deep` frames, uint16 with 65535 for white, which hold what files of more than 8 bits per channel have.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps, UnidentifiedImageError

from vrt.data.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm")
PNG_SIGNATURE, PNG_BITS_AT = b"\x89PNG\r\n\x1a\n", 24
"""How a PNG file begins, and which of its bytes tells the bits per channel (PNG specification, 5.2 and 11.2.2)."""
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
"""How swscale converts colours rightly. By default it darkens those stored at half resolution by one or two levels of 256, as it did when
the first data sets were made of videos; trainings are told apart by the pixels they saw, so `prepare` goes on like that."""
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


def is_video(path: Path) -> bool:
    """By its name, whether it is there or not."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


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


def image_frames(paths: list[Path], deep: bool = False) -> Iterator[np.ndarray]:
    """Raises DataError for an image that can't be read, is transparent, or has another size than the first, or more bits than asked for."""
    yield from _same_size((path, _read_image(path, deep)) for path in paths)


def image_bits(path: Path) -> int:
    """Bits per channel: 8, or for a PNG file what its header says, up to 16."""
    with path.open("rb") as file:
        head = file.read(PNG_BITS_AT + 1)
    return max(8, head[PNG_BITS_AT]) if head.startswith(PNG_SIGNATURE) and len(head) > PNG_BITS_AT else 8


def _read_image(path: Path, deep: bool) -> np.ndarray:
    bits = image_bits(path)
    if bits > 8 and not deep:
        raise DataError(f"{path}: expected 8 bits per channel, found {bits}; convert the frames to 8-bit RGB")
    if bits > 8:
        # Pillow drops the lower half of such colours.
        with opened(path) as stream:
            return next(colours(path, frame, "frame", True, True) for frame in stream.container.decode(stream))
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                _check_opaque(path, np.asarray(upright.convert("RGBA"))[..., 3], "the picture")
            pixels = np.asarray(upright.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: expected an image, found a file that can't be read ({error}); replace it or take it out") from None
    return pixels.astype(np.uint16) * 257 if deep else pixels


def _check_opaque(path: Path, alpha: np.ndarray, where: str) -> None:
    if alpha.size and (alpha != np.iinfo(alpha.dtype).max).any():
        raise DataError(f"{path}: expected opaque pixels, found transparent ones in {where}; put it onto a background first")


def video_frames(path: Path, deep: bool = False, exact: bool = False) -> Iterator[np.ndarray]:
    """All frames of a file's first video stream. `exact` is for showing them to people; data sets are prepared without (see EXACT).

    Raises DataError where it is no video, is cut off, damaged or transparent, or changes its frame size.
    """
    frames = (colours(path, frame, f"frame {count}", deep, exact) for count, frame in enumerate(decoded(path)))
    yield from _same_size((path, pixels) for pixels in frames)


def expected_frames(path: Path) -> int:
    """How many frames the file says it has; 0 where it does not say, and not always right. Raises DataError where it is no video."""
    with opened(path) as stream:
        return stream.frames or round(_promised_seconds(stream) * (stream.guessed_rate or 0))


def decoded(path: Path) -> Iterator[av.VideoFrame]:
    """The frames as the file has them. Raises DataError as `video_frames` does, but for their size and transparency."""
    count, end = 0, Fraction(0)
    with opened(path) as stream:
        for frame in stream.container.decode(stream):
            if frame.is_corrupt:
                raise DataError(f"{path}: expected a sound video, found damage in frame {count}; {REPAIR}")
            yield frame
            count += 1
            if frame.pts is not None:
                end = max(end, (frame.pts + frame.duration) * frame.time_base)
        _check_whole(path, stream, count, end)


def _check_whole(path: Path, stream: av.VideoStream, count: int, end: Fraction) -> None:
    """Matroska files are cut off without any decoding error. A little less than was promised is normal, though: edit lists hide frames."""
    promised, seconds = stream.frames, _promised_seconds(stream)
    if promised and promised - count > max(3, promised // 50):
        raise DataError(f"{path}: expected {promised} frames, found {count}; the file is cut off: {REPAIR}")
    # Times, not frames: where the rate varies, their number can't be told from it.
    if not promised and end and seconds - end > max(4 / Fraction(stream.guessed_rate or 25), seconds / 50):
        raise DataError(f"{path}: expected {float(seconds):.1f} s of video, found {float(end):.1f} s; the file is cut off: {REPAIR}")


@contextmanager
def opened(path: Path) -> Iterator[av.VideoStream]:
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


def _promised_seconds(stream: av.VideoStream) -> Fraction:
    """When the video ends by the container's own account; 0 where it gives none."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", stream.metadata.get("DURATION", ""))
    if tag:
        return sum((Fraction(part) * unit for part, unit in zip(tag.groups(), (3600, 60, 1))), Fraction(0))
    return ((stream.start_time or 0) + stream.duration) * stream.time_base if stream.duration else Fraction(0)


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether a frame can have transparent pixels."""
    return any(component.is_alpha for component in frame.format.components)


def colours(path: Path, frame: av.VideoFrame, where: str, deep: bool, exact: bool) -> np.ndarray:
    """(H, W, 3) by the file's own colour matrix and range, turned as its rotation (degrees counterclockwise) says.

    Raises DataError where any pixel is transparent.
    """
    how = EXACT if exact else None
    if has_alpha(frame):
        pixels = frame.to_ndarray(format="rgba64le" if deep else "rgba", interpolation=how)
        _check_opaque(path, pixels[..., 3], where)
        pixels = pixels[..., :3]
    else:
        pixels = frame.to_ndarray(format="rgb48le" if deep else "rgb24", interpolation=how)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _same_size(frames: Iterable[tuple[Path, np.ndarray]]) -> Iterator[np.ndarray]:
    shape = None
    for count, (path, frame) in enumerate(frames):
        shape = shape or frame.shape
        check_size(path, count, shape[:2], frame.shape[:2])
        yield frame


def check_size(path: Path, count: int, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Raises DataError where frame `count` has not the size (height, width) of the first."""
    if found != wanted:
        first, this = (f"{height}x{width}" for height, width in (wanted, found))
        raise DataError(f"{path}: expected frames of one size, {first} as in frame 0; found {this} in frame {count}; cut or scale the source")
