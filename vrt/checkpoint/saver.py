"""The save itself: a snapshot while the training waits, then a commit behind it; and when failing saves must stop the training."""

import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from vrt.checkpoint.errors import CheckpointError, SavesFail
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.snapshot import HostCopy, spoiled
from vrt.observe import log

FAILED_SAVE = "failed_save"
"""The note on the run that tells of the newest failure."""


class Saver:
    """Snapshots the training's state and commits it in the background, one at a time."""

    def __init__(self, folder: CheckpointFolder, publisher: Publisher, most_failed: int = 0):
        """The training must stop when `most_failed` saves failed one after another; 0: it goes on however many do."""
        self._folder, self._publisher, self._most_failed = folder, publisher, most_failed
        self._copy = HostCopy()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._writing: Future | None = None
        self._failed = self._failed_in_a_row = 0
        self.safe_step = 0
        """The newest step that is committed, here or (set by who continues it) by an earlier attempt; 0: none."""
        self.failure: CheckpointError | None = None
        """Why the newest save failed; None where it is on disk."""
        self.must_stop: SavesFail | FloatingPointError | None = None
        """Why the training must not go on, once something is found that says so."""

    def save(
        self,
        step: int,
        tensors: Mapping[str, Any],
        blobs: Mapping[str, bytes],
        facts: dict[str, Any],
        constants: Collection[torch.Tensor] = (),
    ) -> None:
        """Save trees of `tensors` and raw `blobs` by file name (without the step), with `facts` for the manifest.

        `constants`: those of the tensors that never change, which need no copying again.
        Returns once the state is copied; the training may change it then. Sends how long that took as metrics of the step.
        """
        started = time.monotonic()
        self.wait()
        waited = time.monotonic() - started
        copied = self._copy.of(dict(tensors), constants)
        reached(Phase.SNAPSHOT)
        self._writing = self._executor.submit(self._commit, started, step, copied, dict(blobs), facts)
        self._publisher.send({"step": step, "save/blocked_s": time.monotonic() - started, "save/waited_s": waited})

    def wait(self) -> None:
        """Wait until the snapshot being written, if there is one, is committed or has failed."""
        # One thread commits, in order. The future alone would not do: where a second Ctrl-C interrupts this wait, or came before the future
        # was kept, the next save would fill buffers that are still being written, and digests be made of the mixture.
        self._executor.submit(int).result()
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _commit(self, started: float, step: int, tensors: dict[str, Any], blobs: dict[str, bytes], facts: dict[str, Any]) -> None:
        self._copy.wait()
        place = spoiled(tensors)
        if place:
            # Checked here and not in the loop: it costs as much as the copy, and a GPU would have to be waited for.
            self.must_stop = FloatingPointError(f"step {step}: {place} holds values that are no numbers; {unharmed(self.safe_step)}")
            return
        contents = {name: lambda file, tree=tree: torch.save(tree, file) for name, tree in tensors.items()}
        contents |= {name: lambda file, blob=blob: file.write(blob) for name, blob in blobs.items()}
        try:
            manifest = self._folder.commit(
                step, contents, lambda files: Manifest(step=step, files=files, **facts), lambda file: self._publisher.ahead(step, file)
            )
        except CheckpointError as error:
            self._note_failure(step, error)
            return
        if self.failure:
            self._publisher.note(FAILED_SAVE, f"mended: step {step} is saved; before it: {self.failure}")
        self.failure, self._failed_in_a_row, self.safe_step = None, 0, step
        self._publisher.send({"step": step, "save/committed_s": time.monotonic() - started, "save/failed": self._failed})
        reached(Phase.COMMITTED)
        self._publisher.publish(manifest, started)

    def _note_failure(self, step: int, error: CheckpointError) -> None:
        self._failed += 1
        self._failed_in_a_row += 1
        self.failure = error
        self._publisher.send({"step": step, "save/failed": self._failed})
        self._publisher.note(FAILED_SAVE, str(error))
        reason = reason_to_stop(self._failed_in_a_row, self._most_failed, self.safe_step)
        if reason:
            self.must_stop = SavesFail(f"{error}; then start again: {reason}")
            log.error("SAVE FAILED: %s", error)
        else:
            log.error("SAVE FAILED, training goes on (step %d is safe) and the next save tries again: %s", self.safe_step, error)


def reason_to_stop(failed_in_a_row: int, most_failed: int, safe_step: int) -> str | None:
    """Why a training whose newest saves failed must stop, and what it loses; None: it goes on."""
    if not safe_step:
        return "nothing of this training is saved yet, so it stops before there is more to lose"
    if most_failed and failed_in_a_row >= most_failed:
        return f"saves failed one after another: {failed_in_a_row} (checkpoints.most_failed_saves: {most_failed}); step {safe_step} is safe"
    return None


def unharmed(safe_step: int) -> str:
    """What a training that met values which are no numbers has left, and what to do."""
    left = f"the last healthy checkpoint is step {safe_step}" if safe_step else "no checkpoint was made before"
    return f"nothing of this step was saved, {left}: lower optimizer.lr, or look at the data"
