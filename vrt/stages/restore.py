"""`vrt restore`: a video or a folder of pictures, restored with any checkpoint, in memory that does not grow with its length."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.serialize import sha256_of
from vrt.data.clips import DataError
from vrt.data.decoding import image_frames, image_paths, video_frames
from vrt.data.degradations import continue_backwards
from vrt.data.video import VIDEOS, Timing, join, read_timing, write_segment
from vrt.evaluation.tiling import AnySize, Size, restore_stream, tile_count
from vrt.lifecycle import EXIT_CONTINUE_ME, EXIT_DONE, StopRequest
from vrt.observe import log, progress
from vrt.params import Between
from vrt.stages.selector import Chosen, choose

SMALLEST_TILE = 32


class Clip(Protocol):
    """What is to be restored, and where what was restored is kept until it is whole."""

    count: int
    """Frames."""

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3), in order."""

    def keep(self, work: Path, first: int, frames: np.ndarray) -> None:
        """Keep restored frames, uint8 (D, H, W, 3), the first of which has that number."""

    def kept(self, work: Path) -> int:
        """How many frames are kept, from the first on without a gap."""

    def finish(self, work: Path, target: Path) -> None: ...


@dataclass(frozen=True)
class Video:
    source: Path
    suffix: str
    timing: Timing

    @property
    def count(self) -> int:
        return len(self.timing.ticks)

    def frames(self) -> Iterator[np.ndarray]:
        return video_frames(self.source)

    def keep(self, work: Path, first: int, frames: np.ndarray) -> None:
        write_segment(work / f"{first:08d}-{first + len(frames):08d}{self.suffix}", frames, self.timing, first)

    def _segments(self, work: Path) -> list[Path]:
        return sorted(work.glob(f"[0-9]*-*{self.suffix}"))

    def kept(self, work: Path) -> int:
        done = 0
        for segment in self._segments(work):
            first, stop = map(int, segment.stem.split("-"))
            if first != done:
                break
            done = stop
        return done

    def finish(self, work: Path, target: Path) -> None:
        join(self._segments(work), self.source, target)


@dataclass(frozen=True)
class Pictures:
    paths: Sequence[Path]

    @property
    def count(self) -> int:
        return len(self.paths)

    def frames(self) -> Iterator[np.ndarray]:
        return image_frames(list(self.paths))

    def keep(self, work: Path, first: int, frames: np.ndarray) -> None:
        for path, pixels in zip(self.paths[first:], frames):
            unfinished = work / f"unfinished-{path.stem}"
            Image.fromarray(pixels).save(unfinished, format="PNG")
            unfinished.replace(self._restored(work, path))

    @staticmethod
    def _restored(work: Path, path: Path) -> Path:
        return work / f"{path.stem}.png"

    def kept(self, work: Path) -> int:
        return next((number for number, path in enumerate(self.paths) if not self._restored(work, path).exists()), self.count)

    def finish(self, work: Path, target: Path) -> None:
        target.mkdir()
        for path in self.paths:
            self._restored(work, path).replace(self._restored(target, path))


def run_restore(source: Path, target: Path, checkpoint: str, params_path: Path, sigma: float | None = None) -> int:
    """Restore `source` into `target`, which must not exist. The same again goes on where it was interrupted.

    Raises ValueError, whose message is for the user, before any work is done.
    """
    if target.exists():
        raise DataError(f"{target}: expected a new file or folder, found an existing one; choose another name or move it away")
    clip = opened(source, target)
    chosen = choose(checkpoint, params_path)
    level = noise_level(chosen, sigma)
    work = target.with_name(f".restoring-{target.name}")
    begin(work, {"source": digest_of(source), "weights": chosen.sha256, "tile": list(chosen.params.evaluate.tile), "sigma": sigma})
    chosen.network.to("cuda" if torch.cuda.is_available() else "cpu")
    with StopRequest() as stop:
        if not restore_into(work, clip, chosen, level, lambda: stop.reason is not None):
            log.warning("%s: %d of %d frames are restored; run the same again to go on", stop.reason, clip.kept(work), clip.count)
            return EXIT_CONTINUE_ME
    clip.finish(work, target)
    shutil.rmtree(work)
    log.info("restored %d frames of %s with %s: %s", clip.count, source, chosen.name, target)
    return EXIT_DONE


def opened(source: Path, target: Path) -> Clip:
    """The source, read through once where it is a video, so that damage shows before any work is done. Raises DataError."""
    if source.is_dir():
        paths = image_paths(source)
        names = [path.stem for path in paths]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{source}: expected one picture of each name, found two called {twice}; restored, both would be {twice}.png")
        return Pictures(paths)
    if target.suffix.lower() not in VIDEOS:
        raise DataError(f"{target}: expected a name that ends in {', '.join(VIDEOS)} (.mkv is lossless), found {target.suffix or 'no ending'}")
    # Reads it whole, as restoring will.
    count = sum(1 for _ in video_frames(source))
    timing = read_timing(source)
    assert len(timing.ticks) == count, f"{source}: decoded {count} and {len(timing.ticks)} frames"
    return Video(source, target.suffix.lower(), timing)


def noise_level(chosen: Chosen, sigma: float | None) -> float | None:
    """What to tell the network of the noise, 0 to 1; None: it does not ask. Raises CheckpointError where it asks and nobody says, or the reverse."""
    if isinstance(chosen.params.degradation, Between):
        raise CheckpointError(f"{chosen.name}: it makes frames in between, which `vrt restore` can't put into a video; choose another checkpoint")
    if chosen.params.network.nonblind_denoising:
        if sigma is None:
            raise CheckpointError(f"{chosen.name}: it wants to know the noise; say --sigma, in grey levels from 0 to 255")
        return sigma / 255
    if sigma is not None:
        raise CheckpointError(f"{chosen.name}: it finds out about the noise by itself; leave --sigma out")
    return None


def digest_of(source: Path) -> str:
    """What tells a source from another one, or from itself after a change."""
    if source.is_file():
        return sha256_of(source)
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in image_paths(source)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def begin(work: Path, plan: dict) -> None:
    """Have a folder for what is restored; what an interrupted restoration left there stays only where it was the very same."""
    note = work / "plan.json"
    if work.exists() and (not note.exists() or json.loads(note.read_text()) != plan):
        log.warning("%s: left by another restoration; beginning anew", work)
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    note.write_text(json.dumps(plan))


def restore_into(work: Path, clip: Clip, chosen: Chosen, level: float | None, stop: Callable[[], bool]) -> bool:
    """Restore what is not kept yet, piece by piece. False: told to stop; what is done is kept.

    Where the device has too little memory for a tile, goes on with smaller ones.
    """
    settings = chosen.params
    tile, upscale = settings.evaluate.tile, settings.network.upscale
    while (done := clip.kept(work)) < clip.count:
        try:
            if not _some_pieces(work, clip, chosen, tile, level, done, stop):
                return False
        except torch.OutOfMemoryError:
            if max(tile[1:]) <= SMALLEST_TILE:
                raise
            tile = (tile[0], max(SMALLEST_TILE, tile[1] // 2), max(SMALLEST_TILE, tile[2] // 2))
            log.warning("the device has too little memory for a tile: going on with tiles of %d x %d pixels (x%d)", tile[1], tile[2], upscale)
            torch.cuda.empty_cache()
    return True


def _some_pieces(work: Path, clip: Clip, chosen: Chosen, tile: Size, level: float | None, done: int, stop: Callable[[], bool]) -> bool:
    settings = chosen.params
    least, upscale = settings.network.img_size[0], settings.network.upscale
    overlap = tuple(min(o, t // 2) for o, t in zip(settings.evaluate.overlap, tile))
    window = Window(clip, done, level, least)
    height, width = window.size
    size = (max(clip.count, least), height, width)
    with progress("restore", tile_count(size, tile, overlap), "tiles", done=0) as bar:
        pieces = restore_stream(AnySize(chosen.network, upscale), window.read, size, tile, overlap, upscale, done, bar.advance)
        for first, piece in pieces:
            frames = (piece[0, : clip.count - first].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            if len(frames):
                clip.keep(work, first, frames)
            if stop() and clip.kept(work) < clip.count:
                return False
    return True


class Window:
    """The frames that the tiles at hand need, of a clip that is read once."""

    def __init__(self, clip: Clip, first: int, level: float | None, least: int):
        self._frames, self._level, self._least, self._count = clip.frames(), level, least, clip.count
        self._held: list[np.ndarray] = []
        self._begins = 0
        self._peeked = next(self._frames)

    @property
    def size(self) -> tuple[int, int]:
        return self._peeked.shape[:2]

    def read(self, start: int, stop: int) -> Tensor:
        """float32 (1, stop - start, C, H, W) in 0 to 1, with the noise level as a fourth channel where there is one."""
        while self._begins + len(self._held) < min(stop, self._count):
            first = self._begins + len(self._held) == 0
            self._held.append(self._peeked if first else next(self._frames))
            if self._begins + len(self._held) <= start:
                # Not even looked at: an earlier run restored it.
                self._held, self._begins = [], self._begins + len(self._held)
        self._held, self._begins = self._held[start - self._begins :], start
        clip = torch.from_numpy(np.stack(self._held[: stop - start])).permute(0, 3, 1, 2)[None].float() / 255
        if self._level is not None:
            clip = torch.cat([clip, torch.full_like(clip[:, :, :1], self._level)], dim=2)
        return continue_backwards(clip, self._least) if self._count < self._least else clip
