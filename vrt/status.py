"""How a training stands, in one small file: whoever launched it reads there what no server needs to be asked for."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from vrt.observe import log

STATUS = Path("checkpoints/status.json")
"""Where a project keeps it: beside the checkpoints, so neither git nor DVC tracks it."""


@dataclass(frozen=True)
class TrainingStatus:
    """What one attempt at a training last said of itself."""

    lineage: str
    page: str
    """Where people browse its run."""
    attempt: int
    started: float
    """Seconds since the epoch, as all times here."""
    total_steps: int
    resumed: int | None = None
    """The step it goes on from, 0 for a fresh start; None until it trains."""
    training_since: float | None = None
    step: int = 0
    """The newest step that was logged."""
    registered: int = 0
    """The newest registered step; on a machine that does not lead, as of the start of the attempt."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    """Why it failed, as far as it could say so."""


class StatusFile:
    """Keeps the status of the training at hand in a file. A disk that refuses it stops no training."""

    def __init__(self, path: Path, status: TrainingStatus):
        self._path, self._status, self._refused = path, status, False
        # The thread that publishes tells what is registered, the one that trains the rest.
        self._lock = threading.RLock()
        self._write()

    @property
    def now(self) -> TrainingStatus:
        """As it was last written."""
        return self._status

    def begins(self, step: int) -> None:
        """Take over that it trains from now on, after `step`."""
        self.update(resumed=step, step=step, training_since=time.time())

    def update(self, **changes: object) -> None:
        """Set fields of the status, in the file too: that takes a tenth of a millisecond, and a kill may come at any time."""
        with self._lock:
            self._status = replace(self._status, **changes)
            self._write()

    def seen(self, row: Mapping[str, float]) -> None:
        """Take over the metrics of one step."""
        with self._lock:
            metrics = {**self._status.metrics, **{key: value for key, value in row.items() if key != "step"}}
            self.update(step=max(self._status.step, int(row["step"])), metrics=metrics)

    def registered(self, step: int) -> None:
        """Take over that a step was registered."""
        with self._lock:
            self.update(registered=max(self._status.registered, step))

    def _write(self) -> None:
        unfinished = self._path.with_name(f".{self._path.name}.new")
        try:
            unfinished.write_text(json.dumps(asdict(self._status), indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self._path)
        except OSError as error:
            if not self._refused:
                log.warning("%s: %s; the training goes on, but who launched it does not see how far it is", self._path, error.strerror)
            self._refused = True

    @contextmanager
    def reporting(self, step: Callable[[], int]) -> Iterator[None]:
        """At the end of the block, however it ends, say how far the training is (`step`), and why it failed if it did."""
        try:
            yield
        except BaseException as error:
            self.update(error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.update(step=max(self._status.step, step()))


def read_status(path: Path, since: float) -> TrainingStatus | None:
    """What the attempt that started at or after `since` says; None: nothing yet."""
    try:
        status = TrainingStatus(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        # Another version may have written it, and a disk that is full may have cut it: it only informs.
        return None
    return status if status.started >= since else None
