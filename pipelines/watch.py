"""Beside a training: shows in Prefect how it stands, and asks Prefect whether it is still wanted.

In a thread of its own, and every call guarded: Prefect may be gone for as long as it likes, the training does not notice.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Running

from pipelines import heartbeat
from pipelines.process import Logger, launcher_gone
from vrt.status import TrainingStatus, read_status

SECONDS_BETWEEN_LOOKS = 3.0
UNWANTED = {StateType.CANCELLING, StateType.CANCELLED}


class NotWanted(RuntimeError):
    """Prefect was told to cancel this run."""


class Watch:
    """One training's presence in Prefect. A context manager; `interruption` says why the run is to stop, once there is a reason."""

    def __init__(self, path: Path, logger: Logger):
        self._path, self._logger = path, logger
        self._since = time.time()
        self._reason = ""
        self._left = threading.Event()
        self._progress: UUID | None = None
        self._linked = ""
        self._shown: TrainingStatus | None = None
        self._failing: set[str] = set()

    def __enter__(self) -> "Watch":
        # Artifacts belong to the run that the context names.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, UUID(flow_run.id)), name="prefect watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        # Should Prefect not answer just now, nothing is lost by not waiting for it.
        self._thread.join(2 * SECONDS_BETWEEN_LOOKS)

    def interruption(self) -> Exception | None:
        """Why the training is to stop: its run is not wanted any more, or who launched it is gone; None: it may go on."""
        return NotWanted(self._reason) if self._reason else launcher_gone()

    def status(self) -> TrainingStatus | None:
        """What the training says of itself, if it began since this watch."""
        return read_status(self._path, self._since)

    def _run(self, run: UUID) -> None:
        self._guarded("the heartbeat automation", heartbeat.ensure)
        last = False
        while not last:
            last = self._left.wait(SECONDS_BETWEEN_LOOKS)
            self._guarded("the progress", self._show)
            self._guarded("the state of the run", lambda: self._ask(run))

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
            if what in self._failing:
                self._failing.remove(what)
                self._logger.info("Prefect takes %s again", what)
        except Exception as error:
            if what not in self._failing:
                self._logger.warning("Prefect does not take %s (%s: %s); the training goes on", what, type(error).__name__, error)
            self._failing.add(what)

    def _show(self) -> None:
        status = self.status()
        if status is None or status == self._shown:
            return
        if status.page != self._linked:
            create_link_artifact(status.page, link_text=status.lineage, key="mlflow-run", description="The run in MLflow, with its checkpoints")
            self._linked = status.page
        percent = 100 * status.step / status.total_steps
        if self._progress is None:
            self._progress = create_progress_artifact(percent, key="training", description=described(status))
        else:
            update_progress_artifact(self._progress, percent, description=described(status))
        self._shown = status

    def _ask(self, run: UUID) -> None:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
            if state is None:
                return
            if state.type in UNWANTED:
                # The worker's own signal comes first, unless an outage made it deaf.
                self._reason = f"the flow run is {state.name.lower()}"
            elif state.type is StateType.CRASHED and not self._left.is_set():
                # Its heartbeats were missed, as after an outage; but it lives. (Once this watch is left, it may have crashed indeed.)
                client.set_flow_run_state(run, Running(message="was thought crashed, but goes on"), force=True)


def described(status: TrainingStatus) -> str:
    """The training's state in a line, for the progress artifact."""
    shown = {"train/loss": "loss {:.4g}", "val/psnr": "validation {:.2f} dB", "train/steps_per_s": "{:.2f} steps/s"}
    parts = [f"step {status.step} of {status.total_steps}", f"newest registered {status.registered or 'none'}", f"attempt {status.attempt}"]
    parts += [text.format(status.metrics[key]) for key, text in shown.items() if key in status.metrics]
    return ", ".join(parts)


@contextmanager
def in_spite_of_prefect(what: str, logger: Logger) -> Iterator[None]:
    """Run a call to Prefect that may fail: it is said, and no more."""
    try:
        yield
    except Exception as error:
        logger.warning("%s is not in Prefect (%s: %s)", what, type(error).__name__, error)


def report(markdown: str, key: str, description: str, logger: Logger) -> None:
    """Log a page in markdown, and show it in Prefect."""
    logger.info("%s:\n%s", description, markdown)
    with in_spite_of_prefect(description, logger):
        create_markdown_artifact(markdown, key=key, description=description)
