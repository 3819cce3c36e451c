"""Behind the training: publish each committed checkpoint, register it; and send the metrics.

In a thread of its own beside the one that commits, so that an outage of store or registry never keeps a snapshot from disk.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from vrt.checkpoint.errors import CheckpointError, LeaseLost, StoreRefuses, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import FileEntry, Manifest, problems_of
from vrt.checkpoint.repair import Remote, examine_store
from vrt.checkpoint.resume import Candidate, Registered, State
from vrt.lifecycle import wait_for
from vrt.observe import log

SECONDS_BETWEEN_SENDS = 2.0
LONGEST_PAUSE = 30.0
# Fits into the grace period of a preemption.
SECONDS_IN_A_HURRY = 20.0
MOST_REFUSALS = 3


class Registry(Protocol):
    """Where a published checkpoint becomes registered, and metrics go."""

    def registered(self) -> Mapping[int, Registered]:
        """What it has, by step."""

    def check(self, manifest: Manifest) -> object:
        """What it has of the same step. Raises CheckpointError where that has other content."""

    def register(self, manifest: Manifest, address: str, folder: Path) -> None:
        """Enter a checkpoint that is published at `address` and committed in `folder`. Raises CheckpointError as `check` does."""

    def unregister(self, step: int) -> None:
        """Take a step out of it. Raises CheckpointError where it is the champion."""

    def pin(self, step: int, pinned: bool) -> None:
        """Keep a registered step whatever the params say, or no longer."""

    def send(self, rows: list[dict[str, float]]) -> None:
        """Log metrics by name, each row with its step under "step"."""

    def note(self, key: str, text: str) -> None:
        """Tag the run with what a person should see."""


class Fence(Protocol):
    """Keeps a trainer that was thought dead from publishing over its successor."""

    lost: LeaseLost | None
    """Set once it is known that another trainer has taken the lineage over."""

    def validate(self) -> None:
        """Ask whether this trainer is still the one. Raises LeaseLost where it is not, StoreUnavailable where nobody can tell."""


class Publisher:
    """Publishes and registers committed checkpoints, oldest first, and sends metrics; retries until it is finished."""

    def __init__(
        self,
        folder: CheckpointFolder,
        store: Remote,
        registry: Registry,
        fence: Fence | None = None,
        registered: Callable[[Manifest], None] = lambda manifest: None,
        beside: Callable[[Manifest], Mapping[str, bytes]] = lambda manifest: {},
    ):
        """`registered` is called with each checkpoint that was registered, in the background; what it raises is logged.

        `beside` makes the files that are put beside each published checkpoint, for people who have nothing of this project.
        """
        self._folder, self._store, self._registry, self._fence, self._registered = folder, store, registry, fence, registered
        self._beside = beside
        self._changed = threading.Condition()
        self._waiting: list[Manifest] = []
        self._started: dict[int, float] = {}
        self._ahead: list[tuple[int, FileEntry]] = []
        self._refused: dict[int, str] = {}
        self._rows: list[dict[str, float]] = []
        self._refused_rows: list[str] = []
        self._refusals = 0
        self._notes: dict[str, str] = {}
        self._files: dict[str, Mapping[str, bytes]] = {}
        self._trouble: Exception | None = None
        self._finishing = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        """Begin to work, in a thread that ends with `finish` or with the process."""
        self._thread.start()

    @property
    def lost(self) -> LeaseLost | None:
        """Why nothing is published any more, once another trainer has taken the lineage over."""
        return self._fence.lost if self._fence else None

    @property
    def may_arrive_later(self) -> bool:
        """Whether what `finish` found missing only wants an answer of store or registry: then the same command registers it, once they give one."""
        unanswered = self._trouble is None or (isinstance(self._trouble, StoreUnavailable) and not isinstance(self._trouble, StoreRefuses))
        return unanswered and not (self._refused or self._refused_rows)

    def publish(self, manifest: Manifest, started: float | None = None) -> None:
        """Publish and register a committed checkpoint, in the background.

        Where its save `started` (monotonic) is given, the time from then to its registration is sent as a metric.
        """
        with self._changed:
            if started is not None:
                self._started[manifest.step] = started
            self._waiting.append(manifest)
            self._changed.notify()

    def ahead(self, step: int, file: FileEntry) -> None:
        """Upload one file of a step that is still being committed, in the background: its upload overlaps the writing of the rest.

        It may fail, or never be followed by the rest: publishing the step uploads what is missing, and verifies everything.
        """
        with self._changed:
            self._ahead.append((step, file))
            self._changed.notify()

    def send(self, row: dict[str, float]) -> None:
        """Log one step's metrics, in the background, in order."""
        with self._changed:
            self._rows.append(row)

    def note(self, key: str, text: str) -> None:
        """Tag the run, in the background, with what a person should see."""
        with self._changed:
            self._notes[key] = text

    def put_beside(self, address: str, files: Mapping[str, bytes]) -> None:
        """Put small files that are no part of a checkpoint into the store, in the background."""
        with self._changed:
            self._files[address] = files

    def finish(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> list[str]:
        """Wait until all is registered and sent, `seconds` at most, and only SECONDS_IN_A_HURRY more once `hurry` says so.

        Returns what is missing and why, in words.
        """
        with self._changed:
            self._finishing = True
            self._changed.notify()
        wait_for(self._thread, seconds, hurry, SECONDS_IN_A_HURRY)
        with self._changed:
            missing = [*self._refused_rows, *(f"step {step}: {reason}" for step, reason in self._refused.items())]
            trouble = str(self._trouble or "")
            missing += [f"step {manifest.step}: {trouble or 'not published in time'}" for manifest in self._waiting]
            missing += [f"{address}: {trouble or 'not sent in time'}" for address in self._files]
            if self._rows:
                missing.append(f"metrics of {len(self._rows)} steps: {trouble or 'not sent in time'}")
            return missing

    def _run(self) -> None:
        pause = SECONDS_BETWEEN_SENDS
        while True:
            with self._changed:
                if not (self._waiting or self._ahead or self._finishing):
                    self._changed.wait(pause)
                if self._finishing and not (self._waiting or self._rows or self._notes or self._files):
                    return
            try:
                self._work()
                self._trouble, pause = None, SECONDS_BETWEEN_SENDS
            except LeaseLost as error:
                self._trouble = error
                return
            except Exception as error:
                # Whatever it is, the training must go on and the checkpoint is safe on disk: say it and try again.
                pause = min(2 * pause, LONGEST_PAUSE)
                if str(error) != str(self._trouble or ""):
                    log.warning("publishing is held up, training goes on: %s", error, exc_info=not isinstance(error, StoreUnavailable | LeaseLost))
                self._trouble = error
                with self._changed:
                    self._changed.wait(1.0 if self._finishing else pause)

    def _work(self) -> None:
        # The first failure ends the round, so metrics come before the checkpoint whose steps they describe.
        with self._changed:
            rows, notes, files, manifests = list(self._rows), dict(self._notes), dict(self._files), list(self._waiting)
        if rows and self._send(rows):
            with self._changed:
                del self._rows[: len(rows)]
        for key, text in notes.items():
            self._registry.note(key, text)
            with self._changed:
                self._notes.pop(key)
        for address, content in files.items():
            self._store.put_beside(address, content)
            with self._changed:
                self._files.pop(address)
        self._upload_ahead()
        for manifest in manifests:
            self._publish(manifest)
            with self._changed:
                self._waiting.remove(manifest)

    def _upload_ahead(self) -> None:
        with self._changed:
            files, self._ahead = self._ahead, []
        if not files:
            return
        registered = self._registry.registered()
        for step, file in files:
            # What is registered is never overwritten, not even by a training that goes the same way again.
            self._check_fence()
            if step not in registered:
                try:
                    self._store.upload(step, file, self._folder.path)
                except OSError as error:
                    log.info("checkpoint %d: %s was gone before it could be uploaded (%s)", step, file.name, error.strerror)

    def _check_fence(self) -> None:
        if self._fence:
            self._fence.validate()

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

    def _has_its_weights(self, manifest: Manifest, other: Registered) -> bool:
        """Whether the step, which is registered with other content, is so with the very same state.

        A save on a stop request is not validated; trained again, after going back, its step is, and has other metrics and a picture.
        """
        return _state(self._store.manifest(other.address)) == _state(manifest)

    def _is_broken(self, manifest: Manifest, other: Registered) -> bool:
        """Whether the store has lost what is registered of this step with other content, so that nobody can go on from that any more."""
        side = examine_store(manifest.lineage, Candidate(manifest.step, False, other), self._store)
        if side.state is State.HEALTHY:
            return False
        reasons = "; ".join(side.problems) or "the store has nothing of it"
        log.warning("checkpoint %d is registered with other content, which is lost (%s): this one takes its place", manifest.step, reasons)
        return True

    def _replace(self, manifest: Manifest, other: Registered) -> None:
        """Register a checkpoint in the place of a broken one of the same step."""
        # Reading all of that one took its time: a trainer that was thought dead meanwhile must not delete.
        self._check_fence()
        # Cut off from here on, it is local and not registered: the next attempt registers it.
        self._registry.unregister(manifest.step)
        self._store.delete(other.address)
        self._register(manifest)
        if other.pinned:
            self._registry.pin(manifest.step, True)

    def _register(self, manifest: Manifest) -> None:
        problems = problems_of(manifest, self._folder.path)
        if problems:
            raise CheckpointError("; ".join(problems))
        address = self._store.publish(manifest, self._folder.path)
        if files := self._beside(manifest):
            self._store.put_beside(address, files)
        # Uploading took its time: a trainer that was thought dead meanwhile must not register.
        self._check_fence()
        self._registry.register(manifest, address, self._folder.path)

    def _publish(self, manifest: Manifest) -> None:
        started = time.monotonic()
        try:
            self._check_fence()
            known = self._registry.registered().get(manifest.step)
            if known is None or known.digest == manifest.digest:
                self._register(manifest)
            elif self._is_broken(manifest, known):
                self._replace(manifest, known)
            elif self._has_its_weights(manifest, known):
                log.info("checkpoint %d is registered already, with the same weights and other metrics: that one stays", manifest.step)
            else:
                self._registry.check(manifest)
                self._register(manifest)
        except CheckpointError as error:
            log.error("checkpoint %d can't be registered: %s", manifest.step, error)
            self._refused[manifest.step] = str(error)
            return
        started_save = self._started.pop(manifest.step, None)
        if started_save is not None:
            self.send({"step": manifest.step, "save/registered_s": time.monotonic() - started_save})
        log.info("checkpoint %d registered (%.1f MB in %.1f s)", manifest.step, manifest.size / 1e6, time.monotonic() - started)
        try:
            self._registered(manifest)
        except Exception as error:
            # The checkpoint is registered; what follows from it is done after the next one.
            log.warning("after registering checkpoint %d: %s", manifest.step, error, exc_info=not isinstance(error, StoreUnavailable | LeaseLost))


def _state(manifest: Manifest) -> dict[str, str]:
    """The digests of what a training goes on from."""
    return {file.name: file.sha256 for file in manifest.files if file.name.endswith(".pth")}
