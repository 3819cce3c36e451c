"""Tracking: the MLflow run of a lineage, where people browse a training. One run, continued by every attempt.

This module and `registry` are all that import MLflow.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vrt.checkpoint.errors import CheckpointError, StoreRefuses, StoreUnavailable
from vrt.observe import without_credentials

EXPERIMENT = "vrt"
LEASE_KIND = "vrt.lease_kept_in"
DESCRIPTION = "mlflow.note.content"
TABLES = "mlflow.loggedArtifacts"
LONGEST_DESCRIPTION = 8000
"""Characters of a tag's value, at most."""
# By MLflow's names for what HTTP has numbers for. 404 without a word of MLflow's own is a proxy that has lost it.
OUTAGES = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
REFUSALS = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND"}
CHECK_MLFLOW = (
    "check that MLFLOW_TRACKING_URI is MLflow's, and MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD, where it asks for them"
)

Row = dict[str, float]
"""One step's metrics by name, with the step itself under "step"."""


@dataclass(frozen=True)
class Lineage:
    """One training that may span many processes and machines."""

    name: str
    fingerprint: str
    identity: dict[str, Any]

    @property
    def id(self) -> str:
        """What its run, its lease and its local folder go by."""
        return f"{self.name}-{self.fingerprint[:10]}"

    @property
    def model(self) -> str:
        """The registered model its checkpoints are versions of."""
        return f"vrt-{self.name}"


class MlflowRun:
    """The MLflow run of one lineage. `open` or `attach` first."""

    def __init__(self, lineage: Lineage):
        self.lineage = lineage
        self.run_id = ""
        self.attempt = 0
        self._artifacts = ""
        self._experiment_id = ""
        self._sent: dict[str, int] | None = None
        self.about: Mapping[str, str] = {}
        """What to say of every checkpoint of this attempt, as tags of its version."""

    def open(self, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Find or create the run of the lineage, mark it running, and count this attempt.

        Raises StoreUnavailable where MLflow does not answer: without it nobody knows the latest registered step.
        """
        self.find_or_create(params)
        self.begin_attempt(tags)

    def find_or_create(self, params: dict[str, Any]) -> None:
        """Have a run for the lineage, and change nothing of one that exists: another trainer may be at work there."""
        with self.guarded() as client:
            self._experiment_id = self._experiment(client)
            run = self._find(client) or self._the_first(client, self._create_run(client, params))
            self.run_id, self._artifacts = run.info.run_id, run.info.artifact_uri

    def begin_attempt(self, tags: dict[str, str]) -> None:
        """Mark the run running, and count this attempt."""
        with self.guarded() as client:
            self.attempt = int(client.get_run(self.run_id).data.tags.get("vrt.attempts", 0)) + 1
            for key, value in (tags | {"vrt.attempts": str(self.attempt)}).items():
                client.set_tag(self.run_id, key, value)
            client.update_run(self.run_id, status="RUNNING")

    @property
    def artifacts_address(self) -> str:
        """Where the run keeps its files."""
        return self._artifacts

    @property
    def checkpoints_address(self) -> str:
        """Where the checkpoints of the run are published."""
        return f"{self._artifacts}/checkpoints"

    @property
    def lease_address(self) -> str:
        """Where trainers claim the lineage, if the store can be trusted with that."""
        return lease_address(self._artifacts, self.lineage.id)

    def home(self) -> str:
        """Where the runs of all trainings keep their files; the experiment is made where there is none yet."""
        with self.guarded() as client:
            return client.get_experiment(self._experiment(client)).artifact_location

    def attach(self) -> bool:
        """Find the run of the lineage, to read it or add to it, without starting an attempt. False: there is none."""
        with self.guarded() as client:
            self._experiment_id = self._experiment(client)
            run = self._find(client)
            self.run_id, self._artifacts = (run.info.run_id, run.info.artifact_uri) if run else ("", "")
        return bool(run)

    def _find(self, client):
        of_lineage = f"tags.`vrt.lineage` = '{self.lineage.id}'"
        found = client.search_runs([self._experiment_id], filter_string=of_lineage, order_by=["attributes.start_time ASC"], max_results=1)
        return found[0] if found else None

    def _the_first(self, client, created):
        """Of two trainers that began the lineage in the same moment one has looked before the other's run was there: both take the older."""
        first = self._find(client) or created
        if first.info.run_id != created.info.run_id:
            client.delete_run(created.info.run_id)
        return first

    def _experiment(self, client) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            try:
                # The kind makes MLflow open its pages for training, not those for language models.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return client.create_experiment(EXPERIMENT, tags=kind)
            except MlflowException:
                # Another trainer may have created it in between.
                experiment = client.get_experiment_by_name(EXPERIMENT)
                if experiment is None:
                    raise
        if not experiment.artifact_location.startswith("s3://"):
            raise CheckpointError(
                f"MLflow experiment {EXPERIMENT!r} keeps its artifacts at {experiment.artifact_location}; expected an s3:// location: "
                "start the MLflow server with --default-artifact-root s3://BUCKET, and rename that experiment, which keeps its place for ever"
            )
        return experiment.experiment_id

    def _create_run(self, client, params: dict[str, Any]):
        from mlflow.entities import Param

        run = client.create_run(self._experiment_id, run_name=self.lineage.id, tags={"vrt.lineage": self.lineage.id, "vrt.name": self.lineage.name})
        # Values that change between attempts (total steps, intervals) keep their first value here; MLflow params are for ever.
        client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()])
        return client.get_run(run.info.run_id)

    def send(self, rows: Iterable[Row]) -> None:
        """Log metrics by step, leaving out what the run has already: a step that is trained again gives the same values."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self.guarded() as client:
            # After a failure nobody knows what arrived: ask again.
            sent, self._sent = self._sent if self._sent is not None else self._steps_sent(client), None
            points = []
            for row in rows:
                for key in row.keys() - {"step"}:
                    if row["step"] > sent.get(key, 0):
                        points.append(Metric(key, row[key], now, row["step"]))
                        sent[key] = row["step"]
            for start in range(0, len(points), 1000):
                client.log_batch(self.run_id, metrics=points[start : start + 1000])
            self._sent = sent

    def _steps_sent(self, client) -> dict[str, int]:
        """The last step that the run has of each metric."""
        keys = client.get_run(self.run_id).data.metrics
        return {key: max(point.step for point in client.get_metric_history(self.run_id, key)) for key in keys}

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Log results measured at a step, unless the run shows the very same already."""
        with self.guarded() as client:
            shown = client.get_run(self.run_id).data.metrics
            for key, value in metrics.items():
                if shown.get(key) != value:
                    client.log_metric(self.run_id, key, value, step=step)

    def show_table(self, path: str) -> None:
        """Let MLflow's pages show a file of the run, JSON with `columns` and `data`, as a table; `path` is relative to the run's files."""
        with self.guarded() as client:
            shown = json.loads(client.get_run(self.run_id).data.tags.get(TABLES, "[]"))
            entry = {"path": path, "type": "table"}
            if entry not in shown:
                client.set_tag(self.run_id, TABLES, json.dumps([*shown, entry]))

    def note(self, key: str, text: str) -> None:
        """Put a tag on the run that a person should see, such as why a save failed."""
        with self.guarded() as client:
            client.set_tag(self.run_id, f"vrt.{key}", text[:5000])

    def lease_kind(self, decide: Callable[[], str]) -> str:
        """What `decide` once said about where trainers claim this lineage: it must be the same place for all of them, for ever."""
        with self.guarded() as client:
            known = client.get_run(self.run_id).data.tags.get(LEASE_KIND)
        if known is None:
            known = decide()
            with self.guarded() as client:
                client.set_tag(self.run_id, LEASE_KIND, known)
        return known

    def close(self, status: str) -> None:
        """Set the run's status: FINISHED, KILLED (stopped early, goes on later) or FAILED."""
        with self.guarded() as client:
            client.set_terminated(self.run_id, status)

    @property
    def finished(self) -> bool:
        """Whether the newest attempt trained to the end, and everything was registered and sent."""
        with self.guarded() as client:
            return client.get_run(self.run_id).info.status == "FINISHED"

    def settle(self, abandoned: Callable[[], bool]) -> bool:
        """Mark the run KILLED where it is taken to be running and nobody trains it any more. True: it was so."""
        with self.guarded() as client:
            if client.get_run(self.run_id).info.status != "RUNNING" or not abandoned():
                return False
        self.close("KILLED")
        return True

    def describe(self, text: str) -> None:
        """Show a page in markdown as the run's description."""
        with self.guarded() as client:
            client.set_tag(self.run_id, DESCRIPTION, text)

    @property
    def page(self) -> str:
        """The address where people browse the run; known without asking, so that an outage can't spoil the end of a training."""
        return f"{without_credentials(os.environ['MLFLOW_TRACKING_URI']).rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self.run_id}"

    @contextmanager
    def guarded(self) -> Iterator:
        """Yield the MLflow client; an outage leaves as StoreUnavailable, a server that lets nobody in as StoreRefuses."""
        import requests
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address:
            raise StoreUnavailable("MLflow: no address; run `vrt services up` for local services, or set MLFLOW_TRACKING_URI")
        try:
            yield MlflowClient(address)
        except MlflowException as error:
            outage = isinstance(error.__cause__ or error.__context__, requests.RequestException)
            if outage or error.error_code in OUTAGES:
                raise _unavailable(address, error) from error
            if error.error_code in REFUSALS:
                raise StoreRefuses(f"MLflow at {without_credentials(address)} refused ({_reason(error, address)}); {CHECK_MLFLOW}") from error
            raise
        except requests.RequestException as error:
            raise _unavailable(address, error) from error


def _unavailable(address: str, error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"MLflow at {without_credentials(address)} does not answer ({_reason(error, address)}); see `vrt services status`")


def _reason(error: Exception, address: str) -> str:
    said = (str(error) or type(error).__name__).replace(address, without_credentials(address))
    # What was asked comes first in it, and at length; why there was no answer comes last.
    return said.splitlines()[0].rpartition("Caused by ")[2][:200]


def lease_address(artifacts: str, lineage: str) -> str:
    """Beside the runs (EXPERIMENT/RUN/artifacts), not in one: two trainers that start a lineage at once may make two runs of it."""
    return f"{artifacts.rsplit('/', 2)[0]}/leases/{lineage}"
