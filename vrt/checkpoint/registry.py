"""The registry: MLflow, where people browse trainings and their checkpoints, and where a checkpoint becomes registered.

One run per lineage, continued by every attempt. The only module that imports MLflow.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.resume import Registered

EXPERIMENT = "vrt"
PREVIEW = "_preview.png"
LATEST_STEP = "latest-step"
PINNED = "pinned"
HELD = "held-"
"""Begins the tags that say who downloads a version since when."""
LONGEST_HOLD = timedelta(hours=6)
"""Who was killed while downloading must not keep a checkpoint for ever."""
LEASE_KIND = "vrt.lease_kept_in"

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
        return f"{self.name}-{self.fingerprint[:10]}"

    @property
    def model(self) -> str:
        """The registered model its checkpoints are versions of."""
        return f"vrt-{self.name}"


@dataclass(frozen=True)
class Sibling:
    """Another training of the same name that has checkpoints: its lineage, its newest step, and its params as MLflow keeps them, as text."""

    lineage: str
    step: int
    params: dict[str, str]


class MlflowRegistry:
    """The MLflow run and registered model of one lineage. `open` first."""

    def __init__(self, lineage: Lineage):
        self.lineage = lineage
        self.run_id = ""
        self.attempt = 0
        self._artifacts = ""
        self._experiment_id = ""
        self._sent: dict[str, int] | None = None

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
            run = self._find(client) or self._create_run(client, params)
            self.run_id, self._artifacts = run.info.run_id, run.info.artifact_uri

    def begin_attempt(self, tags: dict[str, str]) -> None:
        """Mark the run running, and count this attempt."""
        with self.guarded() as client:
            self.attempt = int(client.get_run(self.run_id).data.tags.get("vrt.attempts", 0)) + 1
            for key, value in (tags | {"vrt.attempts": str(self.attempt)}).items():
                client.set_tag(self.run_id, key, value)
            client.update_run(self.run_id, status="RUNNING")

    @property
    def checkpoints_address(self) -> str:
        """Where the checkpoints of the run are published."""
        return f"{self._artifacts}/checkpoints"

    @property
    def lease_address(self) -> str:
        """Where trainers claim the lineage, if the store can be trusted with that."""
        return lease_address(self._artifacts, self.lineage.id)

    def attach(self) -> bool:
        """Find the run of the lineage, to read it or add to it, without starting an attempt. False: there is none."""
        with self.guarded() as client:
            self._experiment_id = self._experiment(client)
            run = self._find(client)
            self.run_id, self._artifacts = (run.info.run_id, run.info.artifact_uri) if run else ("", "")
        return bool(run)

    def _find(self, client):
        found = client.search_runs([self._experiment_id], filter_string=f"tags.`vrt.lineage` = '{self.lineage.id}'", max_results=1)
        return found[0] if found else None

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

    def sibling(self) -> Sibling | None:
        """The other training of the same name that registered last, to tell what changed. One without checkpoints doesn't count: nothing is lost."""
        with self.guarded() as client:
            versions = client.search_model_versions(f"name = '{self.lineage.model}'", max_results=200, order_by=["version_number DESC"])
            others = [version for version in self._ours(versions) if version.tags.get("lineage", self.lineage.id) != self.lineage.id]
            if not others:
                return None
            lineage = others[0].tags["lineage"]
            runs = client.search_runs([self._experiment(client)], filter_string=f"tags.`vrt.lineage` = '{lineage}'", max_results=1)
            step = max(int(version.tags["step"]) for version in others if version.tags["lineage"] == lineage)
            return Sibling(lineage, step, runs[0].data.params if runs else {})

    def registered(self) -> dict[int, Registered]:
        """What is registered of this lineage, by step."""
        with self.guarded() as client:
            found = [_registered(version) for version in self._versions(client)]
        return {one.step: one for one in found}

    def _versions(self, client) -> list:
        # Not by run: a run can be deleted, or made twice, and its checkpoints are still there.
        mine = f"name = '{self.lineage.model}' and tags.lineage = '{self.lineage.id}'"
        page = client.search_model_versions(mine, max_results=200)
        found = list(page)
        while page.token:
            page = client.search_model_versions(mine, max_results=200, page_token=page.token)
            found += page
        return self._ours(found)

    @staticmethod
    def _ours(versions: Iterable) -> list:
        # A version that someone made by hand may have any tags.
        return [version for version in versions if "digest" in version.tags and version.tags.get("step", "").isdigit()]

    def check(self, manifest: Manifest) -> Registered | None:
        """The registered checkpoint of the same step. Raises CheckpointError where it has other content: it must not be overwritten."""
        known = self.registered().get(manifest.step)
        if known and known.digest != manifest.digest:
            raise CheckpointError(
                f"{manifest.lineage} step {manifest.step} is registered with other content "
                f"(digest {known.digest[:12]}, here {manifest.digest[:12]}): two trainers wrote one lineage, "
                "or the machines compute differently; delete one of the two versions"
            )
        return known

    def register(self, manifest: Manifest, address: str, folder: Path) -> None:
        """Enter a published checkpoint as a model version. Repeating it does nothing.

        Raises CheckpointError where the step is registered with other content.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        known = self.check(manifest)
        with self.guarded() as client:
            if not known:
                try:
                    client.create_registered_model(self.lineage.model)
                except MlflowException as error:
                    if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                        raise
                self._log_preview(client, manifest, folder)
                metrics = {key.replace("/", "_"): f"{value:.6g}" for key, value in manifest.metrics.items()}
                facts = {"step": str(manifest.step), "lineage": manifest.lineage, "digest": manifest.digest, "bytes": str(manifest.size)}
                tags = facts | metrics | manifest.origin
                described = ", ".join([f"step {manifest.step}", *(f"{key} {value}" for key, value in metrics.items())])
                reached(Phase.REGISTER)
                client.create_model_version(
                    self.lineage.model, address, run_id=self.run_id, tags=tags, description=described, await_creation_for=None
                )
            newest = max(self._versions(client), key=lambda version: int(version.tags["step"])).version
            reached(Phase.ALIAS)
            client.set_registered_model_alias(self.lineage.model, LATEST_STEP, newest)

    def _log_preview(self, client, manifest: Manifest, folder: Path) -> None:
        import numpy
        from PIL import Image

        preview = manifest.file(PREVIEW)
        if preview:
            # A real file is logged too (with the checkpoint); this one feeds the run page's slider over steps.
            with Image.open(folder / preview.name) as picture:
                client.log_image(self.run_id, numpy.asarray(picture), key="preview", step=manifest.step, synchronous=True)

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
    def page(self) -> str:
        """The address where people browse the run; known without asking, so that an outage can't spoil the end of a training."""
        return f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self.run_id}"

    @contextmanager
    def guarded(self) -> Iterator:
        """Yield the MLflow client; an outage leaves as StoreUnavailable."""
        import requests
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE, ErrorCode

        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address:
            raise StoreUnavailable("MLflow: no address; run `vrt services up` for local services, or set MLFLOW_TRACKING_URI")
        try:
            yield MlflowClient(address)
        except MlflowException as error:
            outage = isinstance(error.__cause__ or error.__context__, requests.RequestException)
            if outage or error.error_code in (ErrorCode.Name(INTERNAL_ERROR), ErrorCode.Name(TEMPORARILY_UNAVAILABLE)):
                reason = str(error).splitlines()[0][:200]
                raise StoreUnavailable(f"MLflow at {address} does not answer ({reason}); see `vrt services status`") from error
            raise
        except requests.RequestException as error:
            raise StoreUnavailable(f"MLflow at {address} does not answer ({error}); see `vrt services status`") from error


def lease_address(artifacts: str, lineage: str) -> str:
    """Beside the runs (EXPERIMENT/RUN/artifacts), not in one: two trainers that start a lineage at once may make two runs of it."""
    return f"{artifacts.rsplit('/', 2)[0]}/leases/{lineage}"


def _registered(version) -> Registered:
    now = datetime.now(UTC)
    held = any(now - datetime.fromisoformat(since) < LONGEST_HOLD for tag, since in version.tags.items() if tag.startswith(HELD))
    psnr = version.tags.get("val_psnr")
    return Registered(int(version.tags["step"]), version.tags["digest"], version.source, float(psnr) if psnr else None, PINNED in version.tags, held)
