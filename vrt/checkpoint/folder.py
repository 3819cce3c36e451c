"""The local checkpoint folder: atomic commits, and the outbox of what is not registered yet.

Flat and under KAIR's names (`40_G.pth`, `40_E.pth`, `40_optimizerG.pth`), so that KAIR can be pointed at it.
"""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from vrt.checkpoint.errors import CheckpointError, FolderUnavailable
from vrt.checkpoint.manifest import FileEntry, Manifest, manifest_name, problems_of
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.serialize import HashingWriter

Write = Callable[[HashingWriter], Any]
"""Writes one file's content."""

_UNFINISHED = ".unfinished-"
# One file is hashed while another is written; more at once gain nothing that one disk could take.
FILES_AT_ONCE = 2


class CheckpointFolder:
    """The checkpoints of one lineage in `path`."""

    def __init__(self, path: Path):
        self.path = path

    def prepare(self) -> None:
        """Create the folder and clear what a killed commit left behind. Call it as the folder's only writer.

        Raises CheckpointError where the folder can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(f"{_UNFINISHED}*"):
                leftover.unlink()
            probe = self.path / f"{_UNFINISHED}probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"{self.path}: the checkpoint folder can't be written ({error.strerror}); free it or choose another") from error

    def commit(
        self,
        step: int,
        contents: Mapping[str, Write],
        describe: Callable[[tuple[FileEntry, ...]], Manifest],
        written: Callable[[FileEntry], None] = lambda file: None,
    ) -> Manifest:
        """Write all files, then the manifest that `describe` makes of them; durable when this returns.

        `written` hears of each file as soon as it is durable, from the thread that wrote it: of a step that may never be complete.
        Raises CheckpointError (disk full, folder read-only): then nothing of this step is left behind.
        """

        def write_one(name: str, write: Write) -> FileEntry:
            file = self._write(f"{step}_{name}", write)
            written(file)
            return file

        try:
            with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="file") as pool:
                files = tuple(pool.map(write_one, contents.keys(), contents.values()))
            manifest = describe(files)
            reached(Phase.MANIFEST)
            self._write(manifest_name(step), lambda file: file.write(manifest.to_bytes()))
            self._sync()
        except BaseException as error:
            for name in (*(f"{step}_{name}" for name in contents), manifest_name(step)):
                with suppress(OSError):
                    (self.path / name).unlink()
            if not isinstance(error, OSError):
                raise
            hint = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make the folder writable"
            raise CheckpointError(f"{self.path}: step {step} could not be saved ({error.strerror}); {hint}") from error
        return manifest

    def _write(self, name: str, write: Write) -> FileEntry:
        unfinished = self.path / f"{_UNFINISHED}{name}"
        try:
            with unfinished.open("wb") as file:
                writer = HashingWriter(file)
                try:
                    write(writer)
                except RuntimeError as error:
                    raise writer.error or error from error
                file.flush()
                reached(Phase.FSYNC)
                os.fsync(file.fileno())
            reached(Phase.RENAME)
            unfinished.replace(self.path / name)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
        return FileEntry(name, writer.size, writer.sha256)

    def _sync(self) -> None:
        # The renames are durable only with the folder itself.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def steps(self) -> list[int]:
        """Steps with a manifest, newest first."""
        names = (path.name for path in self.path.glob("*_manifest.json"))
        return sorted((int(name.split("_")[0]) for name in names if name.split("_")[0].isdigit()), reverse=True)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a committed step. Raises CheckpointError where it is not readable."""
        path = self.path / manifest_name(step)
        try:
            return Manifest.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error

    def problems(self, step: int, lineage: str) -> list[str]:
        """Why a committed step can't be trusted, in words. Empty: healthy."""
        try:
            manifest = self.manifest(step)
        except CheckpointError as error:
            return [str(error)]
        if (manifest.lineage, manifest.step) != (lineage, step):
            return [f"its manifest is of {manifest.lineage} step {manifest.step}"]
        return problems_of(manifest, self.path)

    def receive(self, manifest: Manifest, fetch: Callable[[FileEntry, Path], None]) -> None:
        """Fill in a checkpoint from elsewhere; `fetch` writes one file to the path given.

        The manifest comes last, as in a commit. Raises CheckpointError where what arrived is not what the manifest says,
        FolderUnavailable where it can't be written here.
        """
        for file in manifest.files:
            unfinished = self.path / f"{_UNFINISHED}{file.name}"
            try:
                fetch(file, unfinished)
                reached(Phase.DOWNLOAD)
                unfinished.replace(self.path / file.name)
            except OSError as error:
                found = f"{self.path / file.name}: could not be written ({error.strerror})"
                raise FolderUnavailable(f"{found}; free space there and start again") from error
        problems = problems_of(manifest, self.path)
        if problems:
            self.set_aside(manifest.step)
            raise CheckpointError("; ".join(problems))
        reached(Phase.REPAIR)
        self._write(manifest_name(manifest.step), lambda file: file.write(manifest.to_bytes()))
        self._sync()

    def delete(self, step: int) -> None:
        """Delete a step's files, the manifest first: where this is cut off, the rest is no checkpoint. Deleting what is gone does nothing."""
        for path in self._files(step):
            path.unlink(missing_ok=True)

    def _files(self, step: int) -> list[Path]:
        """All files of a step, the manifest first: without it the rest is no checkpoint."""
        return sorted(self.path.glob(f"{step}_*"), key=lambda path: path.name != manifest_name(step))

    def set_aside(self, step: int, into: str = "damaged") -> Path:
        """Move a step's files out of the way, into a folder where they can still be looked at."""
        number = 1
        while (aside := self.path / into / f"{step}-{number}").exists():
            number += 1
        aside.mkdir(parents=True)
        for path in self._files(step):
            shutil.move(path, aside / path.name)
            reached(Phase.REPAIR)
        return aside
