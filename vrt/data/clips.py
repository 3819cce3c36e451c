"""Prepared clips on disk, the only code that knows how they are stored.

    data/prepared/index.json            what there is: one entry per clip, with size and SHA-256
    data/prepared/{split}/{name}.npy    one clip: uint8, (D, H, W, 3), RGB
    data/prepared/recorded/{split}/{name}.npy    its degraded frames, where the data set has some: the same shape

D frames, H height, W width. A crop of some frames is read through a memory map, so only its pages are touched.
"""

import fcntl
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field

from vrt.observe import progress
from vrt.typed_yaml import ParamsError, Section, parse

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FORMAT = 1
Shape = tuple[int, ...]
PREPARE = "run `dvc repro prepare` (or `vrt prepare`)"
NO_RECORDING = (
    "expected degraded frames recorded beside it, found none; import pairs of folders with `vrt data import --layout`, "
    "or choose another degradation.kind"
)


class DataError(ValueError):
    """Data that can't be used; the message names the subject, what was expected and found, and the remedy."""


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Recording(Section):
    """The degraded frames that were recorded beside a clip, of the clip's own size."""

    file: Annotated[str, Field(pattern=rf"^recorded/(train|val|test)/{NAME}\.npy$")]
    """Path below the prepared folder."""
    bytes: Annotated[int, Field(gt=0)]
    """Size of the file, header included."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file, header included."""


class Clip(Section):
    """One prepared clip, as the index lists it."""

    split: Split
    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    """Unique within the split."""
    file: Annotated[str, Field(pattern=rf"^(train|val|test)/{NAME}\.npy$")]
    """Path below the prepared folder."""
    frames: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    bytes: Annotated[int, Field(gt=0)]
    """Size of the file, header included."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file, header included."""
    recorded: Recording | None = None
    """Absent from the index of a data set without degraded frames, whose digest is older than this field."""

    @property
    def files(self) -> "list[Clip | Recording]":
        """What is stored of it: file, bytes and sha256 of each."""
        return [self, self.recorded] if self.recorded else [self]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.frames, self.height, self.width, 3

    def __str__(self) -> str:
        return f"{self.split}/{self.name} ({self.frames} frames of {self.height}x{self.width})"


class Index(Section):
    """The content of `index.json`."""

    format: Literal[1]
    dataset: str
    """The folder of `data/raw/` it was prepared from."""
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set; holds no open files, so it travels to worker processes as it is."""

    root: Path
    index: Index
    digest: str
    """SHA-256 (hex) of the index; since the index holds the digest of every clip, it stands for all pixels."""

    @classmethod
    def open(cls, root: Path) -> "PreparedData":
        """Read the index of `root` and check that each clip is there in full size (content: `verify`).

        Raises DataError where the data set is missing, damaged or cut off; it names the file.
        """
        path = root / "index.json"
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{root}: expected a prepared data set, found no index.json; {PREPARE}") from None
        try:
            index = parse(Index, json.loads(text), path)
        except (ParamsError, ValueError) as error:
            raise DataError(f"{path}: expected an index of format {FORMAT}, found a damaged or foreign file; {PREPARE}\n{error}") from None
        for clip in index.clips:
            _check_sizes(root, clip)
        return cls(root, index, hashlib.sha256(text).hexdigest())

    def clips(self, split: Split) -> tuple[Clip, ...]:
        return self._by_split[split]

    def lengths(self, split: Split) -> np.ndarray:
        """Frames of each of `clips`."""
        return self._lengths[split]

    @cached_property
    def _by_split(self) -> dict[Split, tuple[Clip, ...]]:
        # Once: a data set can have 90,000 clips, and every sample asks.
        return {split: tuple(clip for clip in self.index.clips if clip.split == split) for split in SPLITS}

    @cached_property
    def _lengths(self) -> dict[Split, np.ndarray]:
        return {split: np.array([clip.frames for clip in clips], int) for split, clips in self._by_split.items()}

    def read(self, clip: Clip, first_frame: int, frames: int, top: int, left: int, height: int, width: int, recorded: bool = False) -> np.ndarray:
        """A crop of some frames, or of their degraded recording: uint8, (frames, height, width, 3), a copy of its own.

        Raises DataError where the crop leaves the clip, the file can't be read any more, or there is no recording.
        """
        parts = (("frames", first_frame, frames, clip.frames), ("rows", top, height, clip.height), ("columns", left, width, clip.width))
        for what, first, count, size in parts:
            if first < 0 or count < 1 or first + count > size:
                raise DataError(f"clip {clip}: expected {what} within 0 to {size}, found {first} to {first + count}; ask for a part of the clip")
        stored = self._map(clip, recorded)
        return np.array(stored[first_frame : first_frame + frames, top : top + height, left : left + width])

    def read_whole(self, clip: Clip, recorded: bool = False) -> np.ndarray:
        """uint8, (D, H, W, 3)."""
        return self.read(clip, 0, clip.frames, 0, 0, clip.height, clip.width, recorded)

    def verify(self) -> None:
        """Read everything and compare it with the digests of the index. Raises DataError, which names the first clip that differs."""
        with progress("verifying", len(self.index.clips), "clips") as bar:
            for clip in self.index.clips:
                _check_sizes(self.root, clip)
                for stored in clip.files:
                    path = self.root / stored.file
                    with path.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != stored.sha256:
                        raise DataError(f"{path}: expected SHA-256 {stored.sha256[:12]}..., found {found[:12]}...; the file has changed: {PREPARE}")
                bar.advance(clip=clip.name)

    def _map(self, clip: Clip, recorded: bool) -> np.ndarray:
        if recorded and clip.recorded is None:
            raise DataError(f"clip {clip}: {NO_RECORDING}")
        path = self.root / (clip.recorded if recorded else clip).file
        try:
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: expected clip {clip}, found a file that can't be read ({error}); {PREPARE}") from None
        if stored.shape != clip.shape or stored.dtype != np.uint8:
            raise DataError(f"{path}: expected uint8 {clip.shape}, found {stored.dtype} {stored.shape}; {PREPARE}")
        return stored


def _check_sizes(root: Path, clip: Clip) -> None:
    for stored in clip.files:
        path = root / stored.file
        try:
            found = path.stat().st_size
        except OSError:
            raise DataError(f"{path}: expected clip {clip}, found no file; {PREPARE}") from None
        if found != stored.bytes:
            raise DataError(f"{path}: expected {stored.bytes} bytes, found {found}; the file is cut off or damaged: {PREPARE}")


class Writer:
    """Writes the clips of a data set that is not in place yet; see `writing`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._clips: list[Clip] = []

    def add(self, split: Split, name: str, frames: int, pixels: Iterable[np.ndarray], recorded: Iterable[np.ndarray] | None = None) -> Clip:
        """Store a clip of `frames` frames, and the degraded frames recorded beside it; both yield uint8 (H, W, 3) and are never held in whole.

        Raises DataError where they yield another number of frames, or frames of changing size.
        """
        file, recording = f"{split}/{name}.npy", None
        shape, size, digest = self._write(file, frames, pixels, None)
        if recorded is not None:
            beside = f"recorded/{file}"
            _, recorded_size, recorded_digest = self._write(beside, frames, recorded, shape)
            recording = Recording(file=beside, bytes=recorded_size, sha256=recorded_digest)
        height, width, _ = shape
        size_of = {"frames": frames, "height": height, "width": width}
        clip = Clip(split=split, name=name, file=file, **size_of, bytes=size, sha256=digest, recorded=recording)
        self._clips.append(clip)
        return clip

    def _write(self, file_name: str, frames: int, pixels: Iterable[np.ndarray], shape: Shape | None) -> tuple[Shape, int, str]:
        """(shape of a frame, size of the file, its SHA-256); `shape`, if given, is what the frames must have."""
        clip = file_name.removesuffix(".npy")
        path = self._folder / file_name
        path.parent.mkdir(exist_ok=True, parents=True)
        stream = iter(pixels)
        first = next(stream, None)
        if first is None:
            raise DataError(f"clip {clip}: expected {frames} frames, found none; check the frame ranges in dataset.yaml")
        shape = shape or first.shape
        digest = hashlib.sha256()
        with path.open("xb") as file:
            for part in chain([_header((frames, *shape))], _serialised(clip, frames, shape, chain([first], stream))):
                file.write(part)
                digest.update(part)
            return shape, file.tell(), digest.hexdigest()

    def finish(self, dataset: str) -> None:
        """Write the index. Canonical JSON (sorted keys and clips, no spaces), so that equal data has an equal digest."""
        clips = sorted(self._clips, key=lambda clip: (SPLITS.index(clip.split), clip.name))
        content = Index(format=FORMAT, dataset=dataset, clips=tuple(clips)).model_dump(mode="json", exclude_none=True)
        (self._folder / "index.json").write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")


@contextmanager
def writing(root: Path, dataset: str) -> Iterator[Writer]:
    """Write a data set and put it in the place of `root` at the end of the block, all of it or (after an error or a kill) nothing.

    It grows in a hidden folder beside `root`; what a killed writer left there, the next one tidies up. One writer at a time: the
    orphan of a killed `dvc repro` may still be at work when the next begins, which waits for it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f".{root.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _replacing(root, dataset) as writer:
            yield writer


@contextmanager
def _replacing(root: Path, dataset: str) -> Iterator[Writer]:
    new, old = (root.parent / f".{root.name}.{state}" for state in ("new", "old"))
    if old.exists() and not root.exists():
        old.rename(root)  # killed between the two renames below
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        writer = Writer(new)
        yield writer
        writer.finish(dataset)
        if root.exists():
            root.rename(old)
        new.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _header(shape: tuple[int, ...]) -> bytes:
    """The start of an .npy file that holds uint8 of that shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _serialised(clip: str, frames: int, shape: Shape, pixels: Iterable[np.ndarray]) -> Iterator[bytes]:
    count = 0
    for count, frame in enumerate(pixels, start=1):
        if frame.shape != shape or frame.dtype != np.uint8:
            raise DataError(
                f"clip {clip}: expected each frame as uint8 {shape}, found {frame.dtype} {frame.shape} in frame {count}; cut the source there"
            )
        yield frame.tobytes()
    if count != frames:
        raise DataError(f"clip {clip}: expected {frames} frames, found {count}; check the frame ranges in dataset.yaml")
