"""Prepared clips: what there is, and reading it. How a clip is stored is known to `vrt.data.packed` alone.

    data/prepared/index.json             what there is: one entry per clip, with size and digests
    data/prepared/{split}/{name}.b2nd    one clip
    data/prepared/recorded/{split}/{name}.b2nd    its degraded frames, where the data set has some: the same shape

D frames, H height, W width.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from vrt.data.errors import DataError
from vrt.data.packed import SUFFIX, check_digest, npy_header, read_part
from vrt.observe import progress
from vrt.typed_yaml import ParamsError, Section, parse

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FORMAT = 2
PREPARE = "run `dvc repro prepare` (or `vrt prepare`)"
NO_RECORDING = (
    "expected degraded frames recorded beside it, found none; import pairs of folders with `vrt data import --layout`, "
    "or choose another degradation.kind"
)


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Recording(Section):
    """The degraded frames that were recorded beside a clip, of the clip's own size."""

    file: Annotated[str, Field(pattern=rf"^recorded/(train|val|test)/{NAME}\{SUFFIX}$")]
    """Path below the prepared folder."""
    bytes: Annotated[int, Field(gt=0)]
    """Size of the file."""
    sha256: Sha256
    """Of the file."""
    pixels: Sha256
    """Of the frames, however they are packed."""


class Clip(Section):
    """One prepared clip, as the index lists it."""

    split: Split
    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    """Unique within the split."""
    file: Annotated[str, Field(pattern=rf"^(train|val|test)/{NAME}\{SUFFIX}$")]
    """Path below the prepared folder."""
    frames: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    bytes: Annotated[int, Field(gt=0)]
    """Size of the file."""
    sha256: Sha256
    """Of the file."""
    pixels: Sha256
    """Of the frames, however they are packed."""
    recorded: Recording | None = None

    @property
    def files(self) -> "list[Clip | Recording]":
        """What is stored of it: file, bytes and sha256 of each."""
        return [self, self.recorded] if self.recorded else [self]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its frames: (D, H, W, 3)."""
        return self.frames, self.height, self.width, 3

    def __str__(self) -> str:
        return f"{self.split}/{self.name} ({self.frames} frames of {self.height}x{self.width})"


class Index(Section):
    """The content of `index.json`."""

    format: Literal[2]
    dataset: str
    """The folder of `data/raw/` it was prepared from."""
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set; holds no open files, so it travels to worker processes as it is."""

    root: Path
    index: Index
    digest: str
    """SHA-256 (hex) that stands for all frames; `content_digest`."""

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
            for stored in clip.files:
                _check_size(root, clip, stored)
        return cls(root, index, content_digest(index))

    def clips(self, split: Split) -> tuple[Clip, ...]:
        """In the order of the index, which the sampler's draws are numbers in."""
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
        stored = clip.recorded if recorded else clip
        if stored is None:
            raise DataError(f"clip {clip}: {NO_RECORDING}")
        part = slice(first_frame, first_frame + frames), slice(top, top + height), slice(left, left + width)
        with _remedy():
            return read_part(self.root / stored.file, stored.sha256, clip.shape, part)

    def read_whole(self, clip: Clip, recorded: bool = False) -> np.ndarray:
        """uint8, (D, H, W, 3)."""
        return self.read(clip, 0, clip.frames, 0, 0, clip.height, clip.width, recorded)

    def verify(self) -> None:
        """Read everything and compare it with the digests of the index. Raises DataError, which names the first clip that differs."""
        for problem in self.problems():
            raise DataError(problem)

    def problems(self) -> Iterator[str]:
        """As `verify`, but to the end, whatever differs."""
        with progress("verifying", len(self.index.clips), "clips") as bar:
            for clip in self.index.clips:
                for stored in clip.files:
                    try:
                        _check_size(self.root, clip, stored)
                        with _remedy():
                            check_digest(self.root / stored.file, stored.sha256)
                    except DataError as error:
                        yield str(error)
                bar.advance(clip=clip.name)


@contextmanager
def _remedy() -> Iterator[None]:
    """Whatever is wrong with a packed file, it can be made again."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; {PREPARE}") from None


def _check_size(root: Path, clip: Clip, stored: Clip | Recording) -> None:
    path = root / stored.file
    try:
        found = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: expected clip {clip}, found no file; {PREPARE}") from None
    if found != stored.bytes:
        raise DataError(f"{path}: expected {stored.bytes} bytes, found {found}; the file is cut off or damaged: {PREPARE}")


def content_digest(index: Index) -> str:
    """SHA-256 (hex) of what the clips are called and of all their frames, not of how they are packed.

    Trainings are told apart by it, so it is computed as it was when clips were .npy files: of the index of these.
    """
    clips = []
    for clip in index.clips:
        recorded = {"recorded": _as_npy(clip, clip.recorded)} if clip.recorded else {}
        clips.append(clip.model_dump(include={"split", "name", "frames", "height", "width"}) | _as_npy(clip, clip) | recorded)
    return hashlib.sha256(canonical({"clips": clips, "dataset": index.dataset, "format": 1})).hexdigest()


def _as_npy(clip: Clip, stored: Clip | Recording) -> dict[str, Any]:
    size = len(npy_header(clip.shape)) + prod(clip.shape)
    return {"file": stored.file.removesuffix(SUFFIX) + ".npy", "bytes": size, "sha256": stored.pixels}


def canonical(content: dict[str, Any]) -> bytes:
    """JSON with sorted keys and no spaces: the same content is the same bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"
