"""Behind the training: write each snapshot to disk, publish it, register it; and send the metrics.

Two threads, so that an outage of store or registry never keeps a snapshot from being committed.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest, problems_of
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.snapshot import HostCopy
from vrt.checkpoint.store import Store
from vrt.observe import log

SECONDS_BETWEEN_SENDS = 2.0
LONGEST_PAUSE = 30.0
# Fits into the grace period of a preemption.
SECONDS_IN_A_HURRY = 20.0
MOST_REFUSALS = 3


class Registry(Protocol):
    """Where a published checkpoint becomes registered, and metrics go."""

    def check(self, manifest: Manifest) -> object: ...
    def register(self, manifest: Manifest, address: str, folder: Path) -> None: ...
    def send(self, rows: list[dict[str, float]]) -> None: ...
    def note(self, key: str, text: str) -> None: ...


class Publisher:
    """Publishes and registers committed checkpoints, oldest first, and sends metrics; retries until it is finished."""

    def __init__(self, folder: CheckpointFolder, store: Store, registry: Registry):
        self._folder, self._store, self._registry = folder, store, registry
        self._changed = threading.Condition()
        self._waiting: list[Manifest] = []
        self._refused: dict[int, str] = {}
        self._rows: list[dict[str, float]] = []
        self._refused_rows: list[str] = []
        self._refusals = 0
        self._notes: dict[str, str] = {}
        self._trouble = ""
        self._finishing = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def publish(self, manifest: Manifest) -> None:
        """Publish and register a committed checkpoint, in the background."""
        with self._changed:
            self._waiting.append(manifest)
            self._changed.notify()

    def send(self, row: dict[str, float]) -> None:
        """Log one step's metrics, in the background, in order."""
        with self._changed:
            self._rows.append(row)

    def note(self, key: str, text: str) -> None:
        """Tag the run, in the background, with what a person should see."""
        with self._changed:
            self._notes[key] = text

    def finish(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> list[str]:
        """Wait until all is registered and sent, `seconds` at most, and only SECONDS_IN_A_HURRY more once `hurry` says so.

        Returns what is missing and why, in words.
        """
        with self._changed:
            self._finishing = True
            self._changed.notify()
        ends, hurried = time.monotonic() + seconds, False
        while self._thread.is_alive() and time.monotonic() < ends:
            self._thread.join(0.2)
            if hurry() and not hurried:
                hurried, ends = True, min(ends, time.monotonic() + SECONDS_IN_A_HURRY)
        with self._changed:
            missing = [*self._refused_rows, *(f"step {step}: {reason}" for step, reason in self._refused.items())]
            missing += [f"step {manifest.step}: {self._trouble or 'not published in time'}" for manifest in self._waiting]
            if self._rows:
                missing.append(f"metrics of {len(self._rows)} steps: {self._trouble or 'not sent in time'}")
            return missing

    def _run(self) -> None:
        pause = SECONDS_BETWEEN_SENDS
        while True:
            with self._changed:
                if not (self._waiting or self._finishing):
                    self._changed.wait(pause)
                if self._finishing and not (self._waiting or self._rows or self._notes):
                    return
            try:
                self._work()
                self._trouble, pause = "", SECONDS_BETWEEN_SENDS
            except Exception as error:
                # Whatever it is, the training must go on and the checkpoint is safe on disk: say it and try again.
                pause = min(2 * pause, LONGEST_PAUSE)
                if str(error) != self._trouble:
                    log.warning("publishing is held up, training goes on: %s", error, exc_info=not isinstance(error, StoreUnavailable))
                self._trouble = str(error)
                with self._changed:
                    self._changed.wait(1.0 if self._finishing else pause)

    def _work(self) -> None:
        # The first failure ends the round, so metrics come before the checkpoint whose steps they describe.
        with self._changed:
            rows, notes, manifests = list(self._rows), dict(self._notes), list(self._waiting)
        if rows and self._send(rows):
            with self._changed:
                del self._rows[: len(rows)]
        for key, text in notes.items():
            self._registry.note(key, text)
            with self._changed:
                self._notes.pop(key)
        for manifest in manifests:
            self._publish(manifest)
            with self._changed:
                self._waiting.remove(manifest)

    def _send(self, rows: list[dict[str, float]]) -> bool:
        """False: not this time, though the registry answers. Refused again and again, they no longer hold up the checkpoints behind them."""
        try:
            self._registry.send(rows)
        except StoreUnavailable:
            raise
        except Exception as error:
            self._refusals += 1
            log.exception("metrics of steps %d to %d can't be sent", rows[0]["step"], rows[-1]["step"])
            if self._refusals < MOST_REFUSALS:
                return False
            self._refused_rows.append(f"metrics of steps {rows[0]['step']} to {rows[-1]['step']}: {error}")
        self._refusals = 0
        return True

    def _publish(self, manifest: Manifest) -> None:
        started = time.monotonic()
        try:
            self._registry.check(manifest)
            problems = problems_of(manifest, self._folder.path)
            if problems:
                raise CheckpointError("; ".join(problems))
            address = self._store.publish(manifest, self._folder.path)
            self._registry.register(manifest, address, self._folder.path)
        except CheckpointError as error:
            log.error("checkpoint %d can't be registered: %s", manifest.step, error)
            self._refused[manifest.step] = str(error)
            return
        log.info("checkpoint %d registered (%.1f MB in %.1f s)", manifest.step, manifest.size / 1e6, time.monotonic() - started)


class Saver:
    """Snapshots the training's state and commits it in the background, one at a time."""

    def __init__(self, folder: CheckpointFolder, publisher: Publisher):
        self._folder, self._publisher = folder, publisher
        self._copy = HostCopy()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._writing: Future | None = None
        self.failure: CheckpointError | None = None
        """Why the newest save failed; None where it is on disk."""

    def save(self, step: int, tensors: Mapping[str, Any], blobs: Mapping[str, bytes], facts: dict[str, Any]) -> None:
        """Save trees of `tensors` and raw `blobs` by file name (without the step), with `facts` for the manifest.

        Returns once the state is copied; the training may change it then.
        """
        self.wait()
        copied = self._copy.of(dict(tensors))
        reached(Phase.SNAPSHOT)
        self._writing = self._executor.submit(self._commit, step, copied, dict(blobs), facts)

    def _commit(self, step: int, tensors: dict[str, Any], blobs: dict[str, bytes], facts: dict[str, Any]) -> None:
        contents = {name: lambda file, tree=tree: torch.save(tree, file) for name, tree in tensors.items()}
        contents |= {name: lambda file, blob=blob: file.write(blob) for name, blob in blobs.items()}
        try:
            manifest = self._folder.commit(step, contents, lambda files: Manifest(step=step, files=files, **facts))
        except CheckpointError as error:
            log.error("SAVE FAILED, training goes on: %s", error)
            self._publisher.note("failed_save", str(error))
            self.failure = error
            return
        self.failure = None
        reached(Phase.COMMITTED)
        self._publisher.publish(manifest)

    def wait(self) -> None:
        """Wait until the snapshot being written, if there is one, is committed or has failed."""
        if self._writing:
            self._writing.result()
            self._writing = None
