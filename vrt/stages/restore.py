"""`vrt restore`: a video or a folder of pictures, restored with any checkpoint, in memory that does not grow with its length."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vrt.checkpoint.errors import CheckpointError
from vrt.data.clips import DataError
from vrt.evaluation.report import write_file
from vrt.evaluation.tiling import Tiling, tile_count, tile_spans
from vrt.lifecycle import EXIT_CONTINUE_ME, EXIT_DONE, StopRequest
from vrt.observe import log, progress
from vrt.params import Between
from vrt.stages.footage import Source, Target, open_source, open_target
from vrt.stages.making import Doubling, Restoring, side_by_side
from vrt.stages.selector import Chosen, choose


@dataclass(frozen=True)
class Output:
    """A file or folder that is being made."""

    target: Target
    path: Path
    work: Path
    """Where its frames are kept until it is whole."""


@dataclass(frozen=True)
class Outputs:
    """All that one restoration makes."""

    restored: Output
    preview: Output | None

    def each(self) -> list[Output]:
        """The restored one, and the preview where there is one."""
        return [self.restored] + ([self.preview] if self.preview else [])

    def kept(self) -> int:
        """Frames that all of them have."""
        return min(output.target.kept(output.work) for output in self.each())


def run_restore(source_path: Path, target_path: Path, checkpoint: str, params_path: Path, sigma: float | None = None, preview: bool = False) -> int:
    """Restore `source_path` into `target_path`, which must not exist. The same again goes on where it was interrupted.

    With `preview` a second file or folder, of the name `preview_path` gives, has input and result side by side.
    Raises ValueError, whose message is for the user, before any work is done.
    """
    work = target_path.with_name(f".restoring-{target_path.name}")
    shown_path = preview_path(target_path)
    # A preview beside unfinished work is its own, finished just before it was interrupted.
    for path in [target_path] + ([shown_path] if preview and not work.exists() else []):
        check_new(path)
    source = open_source(source_path)
    chosen = choose(checkpoint, params_path)
    level, doubled = noise_level(chosen, sigma), isinstance(chosen.params.degradation, Between)
    if doubled and source.count < 2:
        raise DataError(f"{source_path}: expected at least 2 frames to make others in between, found {source.count}; choose a longer clip")
    target = open_target(source, source_path, target_path, doubled)
    shown = Output(target, shown_path, work / "preview") if preview else None
    outputs = Outputs(Output(target, target_path, work / "restored"), shown)
    evaluate = chosen.params.evaluate
    plan = {"source": source.digest, "weights": chosen.sha256, "tile": list(evaluate.tile), "overlap": list(evaluate.overlap)}
    plan |= {"sigma": sigma, "preview": preview}
    chosen.network.to("cuda" if torch.cuda.is_available() else "cpu")
    with alone_in(work), StopRequest() as stop:
        # Another process may have made it since.
        check_new(target_path)
        begin(work, outputs, plan)
        if not restore_into(outputs, source, chosen, level, lambda: stop.reason is not None):
            log.warning("%s: %d frames are made; run the same again to go on", stop.reason, outputs.kept())
            return EXIT_CONTINUE_ME
        for output in reversed(outputs.each()):
            if not output.path.exists():
                output.target.finish(output.work, output.path)
        shutil.rmtree(work)
    made = f"{source.count} frames of {source_path} {'doubled' if doubled else 'restored'}"
    log.info("%s with %s: %s", made, chosen.name, ", ".join(str(output.path) for output in outputs.each()))
    return EXIT_DONE


def check_new(path: Path) -> None:
    """Raises DataError where there is something already."""
    if path.exists():
        raise DataError(f"{path}: expected a new file or folder, found an existing one; choose another name or move it away")


def preview_path(target_path: Path) -> Path:
    """Where input and result are shown side by side."""
    return target_path.with_name(f"{target_path.stem}-preview{target_path.suffix}")


def noise_level(chosen: Chosen, sigma: float | None) -> float | None:
    """What to tell the network of the noise, 0 to 1; None: it does not ask. Raises CheckpointError where it asks and nobody says, or the reverse."""
    if chosen.params.network.nonblind_denoising:
        if sigma is None:
            raise CheckpointError(f"{chosen.name}: it wants to know the noise; say --sigma, in grey levels from 0 to 255")
        return sigma / 255
    if sigma is not None:
        raise CheckpointError(f"{chosen.name}: it finds out about the noise by itself; leave --sigma out")
    return None


@contextmanager
def alone_in(work: Path) -> Iterator[None]:
    """Have a folder that no other process makes anything in. Raises DataError where one does."""
    descriptor = _locked(work)
    try:
        yield
    finally:
        with suppress(OSError):
            # If it is empty: there is nothing in it to go on from.
            work.rmdir()
        os.close(descriptor)


def _locked(work: Path) -> int:
    while True:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have finished and removed it in between.
            if work.exists() and os.path.samestat(os.fstat(descriptor), os.stat(work)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            told = "another process is restoring into it; wait for that, or choose another name for the output"
            raise DataError(f"{work}: {told}") from None
        os.close(descriptor)


def begin(work: Path, outputs: Outputs, plan: dict) -> None:
    """Have folders for what is made; what an interrupted restoration left there stays only where it was the very same."""
    note, content = work / "plan.json", json.dumps(plan).encode()
    left = list(work.iterdir())
    if left and (not note.exists() or note.read_bytes() != content):
        log.warning("%s: left by another restoration; beginning anew", work)
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for output in outputs.each():
        output.work.mkdir(parents=True, exist_ok=True)
    write_file(note, content)


def restore_into(outputs: Outputs, source: Source, chosen: Chosen, level: float | None, stop: Callable[[], bool]) -> bool:
    """Make what is not kept yet, piece by piece. False: told to stop; what is done is kept.

    Raises TooLittleMemory where the device does not hold the smallest tile.
    """
    doubled = isinstance(chosen.params.degradation, Between)
    total, done = 2 * source.count - 1 if doubled else source.count, outputs.kept()
    if done == total:
        return True
    making = Doubling(source, done, chosen) if doubled else Restoring(source, done, chosen, level)
    tile, overlap, begins = chosen.params.evaluate.tile, making.overlap, making.begins
    left = sum(stop > begins for _, stop in tile_spans(making.size[0], tile[0], overlap[0]))
    tiles = left * tile_count((1, *making.size[1:]), tile, overlap)
    tiling = Tiling(making.network, tile, overlap, making.upscale)
    with progress("restore", tiles, "tiles") as bar:
        for first, piece in tiling.stream(making.read, making.size, begins, bar.advance):
            number, frames = making.frames(first, piece)
            if not len(frames):
                # What was made of a short clip continued backwards.
                continue
            if outputs.preview:
                outputs.preview.target.keep(outputs.preview.work, number, side_by_side(making.before(first, len(frames)), frames))
            outputs.restored.target.keep(outputs.restored.work, number, frames)
            if stop() and outputs.kept() < total:
                return False
    return True
