"""The proof by numbers: one training, killed over and over at every phase of the protocol and at random times, against one left alone.

The kills are SIGKILLs and the servers are the real ones; only the imports are shared (see fork_server.py).
"""

import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import FileEntry, problems_of
from vrt.checkpoint.phases import KILLED, SECONDS, Phase
from vrt.checkpoint.store import S3Store

EVERY = 2
"""Steps between two checkpoints."""
KEEP_ALL = {"checkpoints__keep_last": 1_000_000}
# So few that each attempt deletes some.
KEEP_FEW = {"checkpoints__keep_last": 2}
# The last count at which to kill in each phase: so far into its second checkpoint, or through what a start restores.
DEEPEST = {
    Phase.STEP: 4,
    Phase.SNAPSHOT: 2,
    Phase.WRITE: 200,
    Phase.FSYNC: 10,
    Phase.RENAME: 10,
    Phase.MANIFEST: 2,
    Phase.COMMITTED: 2,
    Phase.UPLOAD: 10,
    Phase.READ_BACK: 8,
    Phase.REGISTER: 2,
    Phase.ALIAS: 2,
    Phase.PRUNE: 4,
    Phase.DOWNLOAD: 5,
    Phase.REPAIR: 5,
}
LONGEST_SECONDS = 3.0


class Killed:
    """One training that is killed again and again, with what must hold after each kill."""

    def __init__(self, workspace, fork_server, versions_of, rng: random.Random):
        self.workspace, self._fork_server, self._versions_of, self._rng = workspace, fork_server, versions_of, rng
        self.digests: dict[int, str] = {}
        """What was ever registered, by step."""

    @property
    def folder(self) -> CheckpointFolder:
        (path,) = (path for path in (self.workspace.root / "checkpoints").iterdir() if path.is_dir())
        return CheckpointFolder(path)

    def kill(self, where: str) -> None:
        """Start it, let it be killed `where`, and check what is left."""
        if where == Phase.DOWNLOAD:
            shutil.rmtree(self.workspace.root / "checkpoints")
        if where == Phase.REPAIR:
            if not self.folder.steps():
                # Killed at its download just before: there is nothing here to damage until a start gets through.
                self.kill(Phase.STEP)
            self._damage()
        count = f"{self._rng.uniform(0, LONGEST_SECONDS):.2f}" if where == SECONDS else self._rng.randint(1, DEEPEST[Phase(where)])
        before = max(self.digests, default=0)

        code, said = self._train(f"{where}:{count}")

        print(f"{where}:{count}, {before} registered before", flush=True)
        assert code == -signal.SIGKILL and f"{where}:{count} {KILLED}" in said, said
        self._check_start(said, before)
        self._check_registry()

    def finish(self, step: int) -> None:
        before = max(self.digests, default=0)
        self.workspace.edit(train__total_steps=step)
        code, said = self._train()
        assert code == 0, said
        self._check_start(said, before)
        self._check_registry()

    def _train(self, kill_at: str = "") -> tuple[int, str]:
        training = self._fork_server.train(self.workspace, kill_at)
        return training.wait(), training.log.read_text()

    def _check_start(self, said: str, before: int) -> None:
        """A start loses at most the steps since the last registered checkpoint."""
        continued = re.search(r"continuing after step (\d+)", said)
        if continued:
            assert int(continued[1]) >= before, f"{before} was registered\n{said}"
        else:
            # Killed while it fetched or repaired what it would have continued from, or there was nothing yet.
            assert "starting at step 1" not in said or not before, said

    def _check_registry(self) -> None:
        """One version a step, with the bytes it always had, complete in the store; and the newest never goes."""
        versions = self._versions_of(self.workspace.name)
        found = {int(version.tags["step"]): version for version in versions}
        assert len(found) == len(versions), "a step is registered twice"
        for step, version in found.items():
            assert self.digests.setdefault(step, version.tags["digest"]) == version.tags["digest"]
        assert max(found, default=0) == max(self.digests, default=0), "the newest registered step is gone"
        for version in sorted(versions, key=lambda version: -int(version.tags["step"]))[:3]:
            assert download_problems(version.source, version.tags["digest"], self.workspace.root / "fetched") == []

    def _damage(self) -> None:
        """Spoil a file of the newest local checkpoint."""
        folder = self.folder
        step = folder.steps()[0]
        path = self._rng.choice(sorted(folder.path.glob(f"{step}_*")))
        content = bytearray(path.read_bytes())
        if self._rng.random() < 0.5:
            content[self._rng.randrange(len(content))] ^= 1
        else:
            del content[self._rng.randrange(len(content)) :]
        path.write_bytes(content)


def download_problems(address: str, digest: str, folder: Path) -> list[str]:
    """What is wrong with a registered checkpoint's bytes in the store."""
    store = S3Store(address.rsplit("/", 1)[0])
    manifest = store.manifest(address)
    if manifest.digest != digest:
        return [f"{address}: the manifest is not the one registered"]
    folder.mkdir()
    for file in manifest.files:
        store.fetch(address, file, folder / file.name)
    problems = problems_of(manifest, folder)
    shutil.rmtree(folder)
    return problems


def files_by_step(folder: CheckpointFolder) -> dict[int, tuple[FileEntry, ...]]:
    return {step: folder.manifest(step).files for step in folder.steps()}


def points(workspace, lineage: str) -> dict[str, list[tuple[int, float]]]:
    """Every point of MLflow's curves, as logged: duplicates show."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name("vrt")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`vrt.lineage` = '{lineage}'")
    names = ("train/loss", "train/lr", "val/psnr", "val/ssim")
    return {name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)] for name in names}


def kills(rounds: int, rng: random.Random) -> Iterator[str]:
    """Every phase, and a random time, once in each round, in any order; in the first those come last that need checkpoints to work on."""
    phases = [*DEEPEST, SECONDS]
    for number in range(rounds):
        order = rng.sample(phases, len(phases))
        yield from order if number else sorted(order, key=lambda phase: phase in (Phase.DOWNLOAD, Phase.REPAIR, Phase.PRUNE))


def prove(rounds: int, seed: int, make_workspace, fork_server, versions_of) -> None:
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    workspace = make_workspace("matrix")
    workspace.edit(train__checkpoint_every=EVERY, train__validate_every=EVERY, train__total_steps=100_000, **KEEP_FEW)
    killed = Killed(workspace, fork_server, versions_of, rng)
    for where in kills(rounds, rng):
        killed.kill(where)
    # Metrics of steps that were trained and then lost are kept: both trainings have to come past them.
    furthest = max(*killed.digests, *killed.folder.steps(), *(step for step, _ in points(workspace, killed.folder.path.name)["train/loss"]))
    last = EVERY * (furthest // EVERY + 1)
    killed.finish(last)

    twin = make_workspace("twin")
    twin.edit(train__checkpoint_every=EVERY, train__validate_every=EVERY, train__total_steps=last, **KEEP_ALL)
    alone = Killed(twin, fork_server, versions_of, rng)
    alone.finish(last)

    assert sorted(alone.digests) == [1, *range(EVERY, last + 1, EVERY)]
    assert killed.digests.keys() <= alone.digests.keys() and max(killed.digests) == last
    # The digest names the lineage, so it is the files that are compared: weights, EMA, optimizer, history and preview of every step.
    twins = files_by_step(alone.folder)
    here = files_by_step(killed.folder)
    assert last in here and here.items() <= twins.items()
    for version in versions_of(workspace.name):
        manifest = S3Store(version.source.rsplit("/", 1)[0]).manifest(version.source)
        assert manifest.files == twins[manifest.step]
    assert points(workspace, killed.folder.path.name) == points(twin, alone.folder.path.name)
    assert [step for step, _ in points(workspace, killed.folder.path.name)["train/loss"]] == list(range(1, last + 1))


def test_killed_once_in_each_phase_a_training_loses_nothing_and_ends_bit_identically(services, make_workspace, fork_server, versions_of):
    prove(1, 20_11, make_workspace, fork_server, versions_of)


@pytest.mark.long
def test_killed_two_hundred_times_a_training_loses_nothing_and_ends_bit_identically(services, make_workspace, fork_server, versions_of):
    prove(15, time.time_ns(), make_workspace, fork_server, versions_of)
