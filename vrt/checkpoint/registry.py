"""The registry: where a checkpoint becomes registered, as a version of a model in MLflow."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.resume import Registered
from vrt.checkpoint.tracking import MlflowRun

PREVIEW = "_preview.png"
LATEST_STEP = "latest-step"
BEST = "best"
CHAMPION = "champion"
"""Aliases of a registered model, which all trainings of its name share: the newest step and the highest validation PSNR of the one that
registered last; and the checkpoint that `vrt promote` chose."""
SHOWN = ("val/psnr", "val/ssim", "train/loss")
NEWEST = 50
"""Versions that are looked through for the newest step: more than are ever registered again out of order (`vrt checkpoints repair`)."""
PINNED = "pinned"
HELD = "held-"
"""Begins the tags that say who downloads a version since when."""
LONGEST_HOLD = timedelta(hours=6)
"""Who was killed while downloading must not keep a checkpoint for ever."""


@dataclass(frozen=True)
class Sibling:
    """Another training of the same name that has checkpoints: its lineage, its newest step, and its params as MLflow keeps them, as text."""

    lineage: str
    step: int
    params: dict[str, str]


class MlflowRegistry(MlflowRun):
    """The registered model of one lineage, beside its run. `open` or `attach` first."""

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
            versions = self._versions(client)
            champion = self._aliases(client).get(CHAMPION) if versions else None
        found = [_registered(version, champion) for version in versions]
        return {one.step: one for one in found}

    def latest(self) -> Registered | None:
        """The newest registered step, found without listing all there are: steps are registered in their order, or nearly so.

        What is continued from is decided from all of them (`registered`).
        """
        with self.guarded() as client:
            mine = f"name = '{self.lineage.model}' and tags.lineage = '{self.lineage.id}'"
            found = self._ours(client.search_model_versions(mine, max_results=NEWEST, order_by=["version_number DESC"]))
        newest = max(found, key=lambda version: int(version.tags["step"]), default=None)
        return _registered(newest, None) if newest else None

    def entries(self) -> list[dict[str, str]]:
        """The tags of every registered checkpoint of this lineage, and its version as "version", the newest step first."""
        with self.guarded() as client:
            versions = self._versions(client)
        return sorted(({**version.tags, "version": str(version.version)} for version in versions), key=lambda entry: -int(entry["step"]))

    def _aliases(self, client) -> dict[str, str]:
        """The version that each alias of the model points to; a search for versions does not tell."""
        return {alias: str(version) for alias, version in client.get_registered_model(self.lineage.model).aliases.items()}

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
                reached(Phase.REGISTER)
                client.create_model_version(
                    self.lineage.model,
                    address,
                    run_id=self.run_id,
                    tags=_facts(manifest) | dict(self.about),
                    description=self._described(manifest, address),
                    await_creation_for=None,
                )
            versions = self._versions(client)
            reached(Phase.ALIAS)
            self._point_aliases(client, versions)

    def _point_aliases(self, client, versions: Sequence) -> None:
        """Let `latest-step` and `best` follow the versions of this lineage."""
        before = self._aliases(client)
        wanted: dict[str, str] = {}
        if versions:
            wanted[LATEST_STEP] = str(max(versions, key=lambda version: int(version.tags["step"])).version)
        scored = [version for version in versions if "val_psnr" in version.tags]
        if scored:
            # The earliest among equals, as in `retention.retain`.
            wanted[BEST] = str(min(scored, key=lambda version: (-float(version.tags["val_psnr"]), int(version.tags["step"]))).version)
        for alias in (LATEST_STEP, BEST):
            if alias in wanted and before.get(alias) != wanted[alias]:
                client.set_registered_model_alias(self.lineage.model, alias, wanted[alias])
            elif alias not in wanted and alias in before:
                client.delete_registered_model_alias(self.lineage.model, alias)

    def _described(self, manifest: Manifest, address: str) -> str:
        """What the page of a version shows, in markdown; its links lead to the same MLflow, whatever it is called."""
        run = f"#/experiments/{self._experiment_id}/runs/{self.run_id}"
        folder = address.removeprefix(f"{self._artifacts}/")
        lines = [f"**Step {manifest.step}** of [{manifest.lineage}]({run}): [its files]({run}/artifacts/{folder})"]
        lines += [f"- {key} {value:.6g}" for key, value in manifest.metrics.items()]
        if preview := manifest.file(PREVIEW):
            picture = f"get-artifact?path={folder}/{preview.name}&run_uuid={self.run_id}"
            lines += ["", f"Input, restored, truth:\n\n![preview]({picture})"]
        return "\n".join(lines)

    def _log_preview(self, client, manifest: Manifest, folder: Path) -> None:
        import numpy
        from PIL import Image

        preview = manifest.file(PREVIEW)
        if preview:
            # A real file is logged too (with the checkpoint); this one feeds the run page's slider over steps.
            with Image.open(folder / preview.name) as picture:
                client.log_image(self.run_id, numpy.asarray(picture), key="preview", step=manifest.step, synchronous=True)


def _facts(manifest: Manifest) -> dict[str, str]:
    """The tags of a version, no more than people look for: each costs time whenever all versions are listed. The manifest has the rest."""
    facts = {"step": str(manifest.step), "lineage": manifest.lineage, "digest": manifest.digest, "bytes": str(manifest.size)}
    return facts | shown(manifest.metrics) | {key: manifest.origin[key] for key in ("attempt", "code_version", "parent") if key in manifest.origin}


def shown(metrics: Mapping[str, float]) -> dict[str, str]:
    """The metrics that a version is tagged with."""
    return {key.replace("/", "_"): f"{metrics[key]:.6g}" for key in SHOWN if key in metrics}


def _registered(version, champion: str | None) -> Registered:
    now = datetime.now(UTC)
    held = any(now - datetime.fromisoformat(since) < LONGEST_HOLD for tag, since in version.tags.items() if tag.startswith(HELD))
    psnr = version.tags.get("val_psnr")
    return Registered(
        int(version.tags["step"]),
        version.tags["digest"],
        version.source,
        psnr=float(psnr) if psnr else None,
        pinned=PINNED in version.tags,
        held=held,
        champion=str(version.version) == champion,
    )
