"""The registry for those who look after what is in it: pins, holds, deletions, and the lineages there are."""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.registry import CHAMPION, HELD, PINNED, MlflowRegistry, shown
from vrt.checkpoint.tracking import Lineage, lease_address
from vrt.observe import log


class Curator(MlflowRegistry):
    """The registry of one lineage. `open` or `attach` first."""

    def noted(self, key: str) -> str:
        """What `note` last put on the run under this key; nothing: it never did."""
        with self.guarded() as client:
            return client.get_run(self.run_id).data.tags.get(f"vrt.{key}", "")

    def pin(self, step: int, pinned: bool) -> None:
        """Keep a registered step whatever the params say, or no longer. Raises CheckpointError where it is not registered."""
        with self.guarded() as client:
            for version in self._of_step(client, step):
                if pinned:
                    client.set_model_version_tag(self.lineage.model, version.version, PINNED, "true")
                elif PINNED in version.tags:
                    client.delete_model_version_tag(self.lineage.model, version.version, PINNED)

    @contextmanager
    def hold(self, step: int) -> Iterator[None]:
        """Keep anybody from deleting a registered step while the block downloads it."""
        mine = f"{HELD}{platform.node()}-{os.getpid()}"
        with self.guarded() as client:
            versions = [version.version for version in self._of_step(client, step)]
            for version in versions:
                client.set_model_version_tag(self.lineage.model, version, mine, datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            yield
        finally:
            try:
                with self.guarded() as client:
                    for version in versions:
                        client.delete_model_version_tag(self.lineage.model, version, mine)
            except StoreUnavailable as error:
                # It expires by itself.
                log.warning("step %d stays marked as being downloaded for a while: %s", step, error)

    def unregister(self, step: int) -> None:
        """Let the aliases point to what is left without a step, then take every version of it out of the registry.

        Raises CheckpointError where it is the champion.
        """
        with self.guarded() as client:
            going = self._of_step(client, step)
            if self._aliases(client).get(CHAMPION) in [str(version.version) for version in going]:
                raise CheckpointError(f"{self.lineage.id} step {step} is the champion: promote another one first (`vrt promote`)")
            self._point_aliases(client, [version for version in self._versions(client) if int(version.tags["step"]) != step])
            for version in going:
                client.delete_model_version(self.lineage.model, version.version)

    def led_to(self, alias: str) -> tuple[str, int] | None:
        """The lineage and step that an alias of the model points to; None: there is no such alias."""
        with self.guarded() as client:
            if not client.search_registered_models(filter_string=f"name = '{self.lineage.model}'"):
                return None
            version = self._aliases(client).get(alias)
            if version is None:
                return None
            tags = client.get_model_version(self.lineage.model, version).tags
        return tags["lineage"], int(tags["step"])

    def lineage_of_run(self, run_id: str) -> str:
        """The lineage whose run that is. Raises CheckpointError where it is no training's."""
        with self.guarded() as client:
            runs = client.search_runs([self._experiment(client)], filter_string=f"attributes.run_id = '{run_id}'", max_results=1)
        if not runs or "vrt.lineage" not in runs[0].data.tags:
            raise CheckpointError(f"run {run_id}: MLflow has no training of that id; `vrt checkpoints list` and MLflow's pages show what there is")
        return runs[0].data.tags["vrt.lineage"]

    def attempts(self) -> int:
        """How many attempts the run has had."""
        with self.guarded() as client:
            return int(client.get_run(self.run_id).data.tags.get("vrt.attempts", 0))

    def tags_of(self, step: int) -> dict[str, str]:
        """What the version of a registered step is tagged with."""
        with self.guarded() as client:
            return dict(self._of_step(client, step)[0].tags)

    def tag(self, step: int, tags: Mapping[str, str]) -> None:
        """Say more of a registered step."""
        with self.guarded() as client:
            for version in self._of_step(client, step):
                self._tag(client, version, tags)

    def score(self, scores: Mapping[int, Mapping[str, float]]) -> None:
        """Say of each registered step how good it is, where that was measured only after it was registered, and let `best` follow.

        `scores`: what the validations measured, by step. Repeating it does nothing.
        """
        with self.guarded() as client:
            versions = self._versions(client)
            late = [version for version in versions if "val_psnr" not in version.tags and int(version.tags["step"]) in scores]
            for version in late:
                self._tag(client, version, shown(scores[int(version.tags["step"])]))
            if late:
                self._point_aliases(client, self._versions(client))

    def crown(self, step: int) -> None:
        """Let the alias `champion` point to a registered step."""
        with self.guarded() as client:
            client.set_registered_model_alias(self.lineage.model, CHAMPION, self._of_step(client, step)[0].version)

    def _tag(self, client, version, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(self.lineage.model, version.version, key, value)

    def _of_step(self, client, step: int) -> list:
        found = [version for version in self._versions(client) if int(version.tags["step"]) == step]
        if not found:
            raise CheckpointError(f"{self.lineage.id} step {step} is not registered; `vrt checkpoints list` shows what is")
        return found

    def addresses(self) -> list[str]:
        """Where the trainings of this name keep anything in the store: their artifacts, and the claims on them."""
        with self.guarded() as client:
            runs = client.search_runs([self._experiment(client)], filter_string=f"tags.`vrt.name` = '{self.lineage.name}'")
        leases = {lease_address(run.info.artifact_uri, run.data.tags["vrt.lineage"]) for run in runs}
        return [*(run.info.artifact_uri for run in runs), *sorted(leases)]

    def forget(self) -> tuple[int, int]:
        """Remove the trainings of this name, which were only drills: their registered model and their runs (which MLflow keeps in its trash).

        Returns how many versions and how many runs went. Clear their `addresses` before. Repeating it does nothing.
        """
        with self.guarded() as client:
            versions = len(client.search_model_versions(f"name = '{self.lineage.model}'", max_results=1000))
            if client.search_registered_models(filter_string=f"name = '{self.lineage.model}'"):
                client.delete_registered_model(self.lineage.model)
            runs = client.search_runs([self._experiment(client)], filter_string=f"tags.`vrt.name` = '{self.lineage.name}'")
            for run in runs:
                client.delete_run(run.info.run_id)
        return versions, len(runs)

    def lineages(self) -> list[str]:
        """Every lineage the registry knows, the latest first."""
        with self.guarded() as client:
            runs = client.search_runs([self._experiment(client)], filter_string="tags.`vrt.lineage` LIKE '%'", max_results=1000)
        return list(dict.fromkeys(run.data.tags["vrt.lineage"] for run in runs))


def lineage_named(identifier: str) -> Lineage:
    """The lineage NAME-FINGERPRINT, of which nothing else is known."""
    name, _, fingerprint = identifier.rpartition("-")
    return Lineage(name, fingerprint, {})
