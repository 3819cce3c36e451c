"""Write a prepared data set: clip by clip, and in place all at once or not at all."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vrt.data.clips import FORMAT, SPLITS, Clip, Index, Recording, Split, canonical
from vrt.data.packed import SUFFIX, pack

ENTRIES = "entries"
"""While a data set is written: one file for each finished clip, which the next writer goes on from."""


def pack_clip(
    folder: Path,
    split: Split,
    name: str,
    frames: int,
    pixels: Iterable[np.ndarray],
    recorded: Iterable[np.ndarray] | None = None,
    source: str | None = None,
) -> Clip:
    """Store a clip of `frames` frames, and the degraded frames recorded beside it; both yield uint8 (H, W, 3) and are never held in whole.

    `source`, if given, stands for all the clip is made of: should the writing of the data set be interrupted, the next one takes the
    clip over where it is the same. Safe to be called for several clips at once, also by several processes.
    Raises DataError where they yield another number of frames, or frames of changing size.
    """
    file = f"{split}/{name}{SUFFIX}"
    beside = f"recorded/{file}"
    for path in (file, *([beside] if recorded is not None else [])):
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
    sharp = pack(folder / file, f"{split}/{name}", frames, pixels)
    recording = None
    if recorded is not None:
        degraded = pack(folder / beside, f"recorded/{split}/{name}", frames, recorded, sharp.shape)
        recording = Recording(file=beside, bytes=degraded.bytes, sha256=degraded.sha256, pixels=degraded.pixels)
    height, width, _ = sharp.shape
    size = {"frames": frames, "height": height, "width": width}
    clip = Clip(split=split, name=name, file=file, **size, bytes=sharp.bytes, sha256=sharp.sha256, pixels=sharp.pixels, recorded=recording)
    if source is not None:
        _note(_entry(folder, split, name), source, clip)
    return clip


class Writer:
    """The clips of a data set that is not in place yet; see `writing`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._clips: list[Clip] = []

    def add(self, split: Split, name: str, frames: int, pixels: Iterable[np.ndarray], recorded: Iterable[np.ndarray] | None = None) -> None:
        """`pack_clip` and `enter`."""
        self.enter(pack_clip(self.folder, split, name, frames, pixels, recorded))

    def enter(self, clip: Clip) -> None:
        """Take in a clip that `pack_clip` stored in `folder`; others there do not become part of the data set."""
        self._clips.append(clip)

    def finished(self, split: Split, name: str, source: str) -> Clip | None:
        """A clip that an interrupted writer stored already, of the same source."""
        try:
            note = json.loads(_entry(self.folder, split, name).read_bytes())
            clip = Clip.model_validate_json(json.dumps(note["clip"]))
        except (FileNotFoundError, ValueError, KeyError):
            return None
        # What a power cut did to the bytes shows when they are read.
        whole = all((self.folder / stored.file).exists() and (self.folder / stored.file).stat().st_size == stored.bytes for stored in clip.files)
        return clip if whole and note["source"] == source else None

    def finish(self, dataset: str) -> None:
        """Write the index of the clips entered, and delete whatever else lies in the folder."""
        clips = tuple(sorted(self._clips, key=lambda clip: (SPLITS.index(clip.split), clip.name)))
        listed = {self.folder / stored.file for clip in clips for stored in clip.files}
        shutil.rmtree(self.folder / ENTRIES, ignore_errors=True)
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in listed:
                path.unlink()  # an interrupted writer's, of a clip that the data set has no more
        content = Index(format=FORMAT, dataset=dataset, clips=clips).model_dump(mode="json", exclude_none=True)
        (self.folder / "index.json").write_bytes(canonical(content))


@contextmanager
def writing(root: Path, dataset: str) -> Iterator[Writer]:
    """Write a data set and put it in the place of `root` at the end of the block, all of it or (after an error or a kill) nothing.

    It grows in a hidden folder beside `root`, where finished clips of known source stay for the next writer. One writer at a time: the
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
    shutil.rmtree(old, ignore_errors=True)
    if not (new / ENTRIES).exists():
        shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True, exist_ok=True)
    try:
        writer = Writer(new)
        yield writer
        writer.finish(dataset)
        if root.exists():
            root.rename(old)
        new.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if not (new / ENTRIES).exists():
            shutil.rmtree(new, ignore_errors=True)


def _entry(folder: Path, split: Split, name: str) -> Path:
    return folder / ENTRIES / split / f"{name}.json"


def _note(entry: Path, source: str, clip: Clip) -> None:
    entry.parent.mkdir(exist_ok=True, parents=True)
    unfinished = entry.with_name(f".{entry.name}.{os.getpid()}")
    unfinished.write_text(json.dumps({"source": source, "clip": clip.model_dump(mode="json", exclude_none=True)}), encoding="utf-8")
    unfinished.replace(entry)
