"""`vrt drill`: prove on the user's own storage, registry and recipe that a killed training loses nothing.

A training under a name of its own is killed again and again and continued each time; then a twin that nobody kills trains to the same step,
and every checkpoint the two have in common must be the same, byte by byte.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ruamel.yaml import YAML

from vrt.checkpoint.curator import Curator
from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.lock import locked
from vrt.checkpoint.manifest import FileEntry, Manifest, problems_of
from vrt.checkpoint.phases import KILL_AT, Phase
from vrt.checkpoint.registry import MlflowRegistry
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import Lineage
from vrt.data.clips import PreparedData
from vrt.data.prepare import prepare
from vrt.lifecycle import EXIT_DONE, EXIT_FAILED
from vrt.observe import log
from vrt.params import load_params, read_yaml
from vrt.stages import CHECKPOINTS, PREPARED
from vrt.stages.drilled import Attempt, Kill, Recovery, Verdict, plan, read_log, show
from vrt.stages.lineage import lineage_of

SCRATCH = Path(".drill")
PREFIX = "drill-"
SHIPPED_DATA = Path(__file__).parents[2] / "data/raw/quickstart/dataset.yaml"
# An attempt that got this far without its kill never reaches it.
MOST_CHECKPOINTS = 6
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass
class Trainee:
    """One training of the drill, in a folder of its own."""

    folder: Path
    name: str
    every: int
    """Steps between two checkpoints."""
    lineage: Lineage
    files: dict[int, tuple[FileEntry, ...]] = field(default_factory=dict)
    """The files of every checkpoint it was ever seen to have, by step."""
    contradictions: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Its folder of them, which `vrt train` made."""
        return CheckpointFolder(self.folder / CHECKPOINTS / self.lineage.id)

    def train(self, total_steps: int, kill: Kill | None = None) -> Attempt:
        """Run `vrt train` to its end, or to its kill, and see what it left. Raises RuntimeError, with its last words, where it failed otherwise."""
        path = self.folder / "params.yaml"
        tree = YAML(typ="safe").load(path.read_text())
        tree["train"] |= {"total_steps": total_steps}
        YAML(typ="safe").dump(tree, path)
        environment = os.environ | {KILL_AT: kill.armed if kill else "", "PYTHONPATH": str(Path(__file__).parents[2])}
        spoken = self.folder / "train.log"
        started, trains_after = time.monotonic(), None
        with spoken.open("w") as output:
            # What is killed must be the process that saves.
            command = [sys.executable, "-m", "vrt", "train", "--processes", "1"]
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    if trains_after is None and read_log(spoken.read_text()).continued is not None:
                        trains_after = time.monotonic() - started
            finally:
                # After Ctrl-C: it need not save, all of this is about to be removed.
                process.kill()
                process.wait()
        said = read_log(spoken.read_text())
        if process.returncode not in (EXIT_DONE, -signal.SIGKILL) or (process.returncode == -signal.SIGKILL) != said.killed:
            tail = "\n  ".join(spoken.read_text().splitlines()[-20:])
            raise RuntimeError(f"a training of the drill ended with code {process.returncode}, which no kill of the drill explains:\n  {tail}")
        self._look()
        return Attempt(said.killed, said.continued, said.steps, trains_after or time.monotonic() - started)

    def _look(self) -> None:
        """Remember what each step's files are; that they are ever others is what must not happen."""
        for step in self.checkpoints.steps():
            self._remember(f"local step {step}", lambda step=step: self.checkpoints.manifest(step))
        store = self._store()
        for one in self._registry().registered().values():
            self._remember(f"registered step {one.step}", lambda one=one: store.manifest(one.address))

    def _remember(self, what: str, read: Callable[[], Manifest]) -> None:
        try:
            manifest = read()
        except CheckpointError as error:
            self.contradictions.append(f"{what}: {error}")
            return
        if self.files.setdefault(manifest.step, manifest.files) != manifest.files:
            self.contradictions.append(f"{what} was seen with two different contents")

    def newest(self) -> int:
        """The newest step it ever had."""
        return max(self.files, default=0)

    def newest_registered(self) -> int:
        """The newest step in MLflow, asked anew; 0: there is none."""
        return max(self._registry().registered(), default=0)

    def registered_problems(self) -> list[str]:
        """What is wrong with the registered checkpoints, after downloading all of them."""
        problems = []
        place = self.folder / "fetched"
        for one in self._registry().registered().values():
            log.info("verifying registered checkpoint %d", one.step)
            place.mkdir()
            try:
                manifest = self._store().manifest(one.address)
                for file in manifest.files:
                    self._store().fetch(one.address, file, place / file.name)
                found = problems_of(manifest, place) if manifest.digest == one.digest else ["the manifest in the store is not the one registered"]
            except CheckpointError as error:
                found = [str(error)]
            problems += [f"registered step {one.step}: {problem}" for problem in found]
            shutil.rmtree(place)
        return problems

    def lose_folder(self) -> None:
        """Delete all local checkpoints, as a new machine would have none."""
        shutil.rmtree(self.folder / CHECKPOINTS)

    def damage(self) -> None:
        """Spoil a file of the newest local checkpoint, as a dying disk would."""
        newest = self.checkpoints.manifest(self.checkpoints.steps()[0])
        path = self.checkpoints.path / max(newest.files, key=lambda file: file.size).name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def _registry(self) -> MlflowRegistry:
        registry = MlflowRegistry(self.lineage)
        registry.attach()
        return registry

    def _store(self) -> S3Store:
        return S3Store(self._registry().checkpoints_address)


def run_drill(params_path: Path, kills: int | None, phases: list[Phase], seed: int, steps: int, every: int) -> int:
    """Kill, continue, compare, print the verdict, and clean up. Returns 0 only where everything is proved.

    `steps`: how far to train at least; `every`: steps between two checkpoints. Raises ValueError for what can't be drilled,
    RuntimeError where a training fails for another reason than a kill.
    """
    recipe = load_params(params_path)
    with locked(SCRATCH), interrupted_by_sigterm():
        clean_up()
        name = f"{PREFIX}{recipe.name}-{os.getpid():x}{int(time.time()):x}"
        planned = plan(phases, kills, seed, every)
        log.info("drill %s: %d kills (seed %d), then a twin that is left alone; nothing of your own trainings is touched", name, len(planned), seed)
        try:
            verdict = drill(params_path, name, planned, steps, every)
        finally:
            clean_up()
    show(verdict)
    return EXIT_FAILED if verdict.reasons else EXIT_DONE


def drill(params_path: Path, name: str, planned: list[Kill], steps: int, every: int) -> Verdict:
    """Train to at least `steps`, killed as `planned`; then the twin; and compare."""
    killed = Drilled(enrol(params_path, name, every))
    for number, kill in enumerate(planned, 1):
        log.info("kill %d of %d: %s", number, len(planned), kill)
        killed.start(kill)
    last = max(steps // every, killed.trainee.newest() // every + 1) * every
    log.info("the last start: to step %d, without a kill", last)
    killed.start(None, last)
    problems = killed.trainee.contradictions + killed.trainee.registered_problems()
    log.info("the twin: %d steps without a kill", last)
    twin = enrol(params_path, f"{name}-twin", every, keep_last=last)
    twin.train(last)
    return Verdict(killed.recoveries, last, problems, killed.trainee.files, twin.files)


@dataclass
class Drilled:
    """The training that is killed, and what became of each kill."""

    trainee: Trainee
    recoveries: list[Recovery] = field(default_factory=list)
    _open: list[Recovery] = field(default_factory=list)
    """Kills after which it has not trained again yet: the next start was killed while it recovered."""
    _step: int = 0

    def start(self, kill: Kill | None, total_steps: int | None = None) -> None:
        """Train up to `total_steps` or the kill, after preparing what that kill needs, and note what became of the kills before."""
        if kill and kill.where in (Phase.DOWNLOAD, Phase.REPAIR):
            if not self.trainee.checkpoints.steps() or not self.trainee.newest_registered():
                # Before the first registration, or killed at its download just before: first there must be something to lose, and to fetch.
                self.start(None, self.trainee.newest_registered() or self.trainee.every)
            self.trainee.lose_folder() if kill.where == Phase.DOWNLOAD else self.trainee.damage()
        total_steps = total_steps or (self.trainee.newest() // self.trainee.every + MOST_CHECKPOINTS) * self.trainee.every
        attempt = self.trainee.train(total_steps, kill)
        if attempt.continued is not None:
            for one in self._open:
                recovery = replace(one, resumed=attempt.continued, seconds=attempt.seconds)
                self.recoveries.append(recovery)
                log.info("%s", recovery)
            self._open = []
            self._step = attempt.continued + attempt.steps
        if kill:
            self._open.append(Recovery(kill, self._step if attempt.killed else None, self.trainee.newest_registered()))


def enrol(params_path: Path, name: str, every: int, keep_last: int = 2) -> Trainee:
    """A folder with the user's recipe under another name, and the prepared data of the project, or a few generated clips."""
    folder = SCRATCH.resolve() / name
    (folder / PREPARED).parent.mkdir(parents=True)
    tree = read_yaml(params_path)
    tree["name"] = name
    tree["train"] |= {"checkpoint_every": every, "validate_every": every, "log_every": 1}
    # Few are kept, so that deleting happens under the kills too.
    tree["checkpoints"] |= {"resume": "auto", "keep_last": keep_last, "keep_every": 0, "keep_best": 0}
    YAML(typ="safe").dump(tree, folder / "params.yaml")
    params = load_params(folder / "params.yaml")
    if PREPARED.exists():
        (folder / PREPARED).symlink_to(PREPARED.resolve(), target_is_directory=True)
    else:
        log.info("no %s here: drilling with generated clips", PREPARED)
        raw = folder / "data/raw/drill"
        raw.mkdir(parents=True)
        content = YAML(typ="safe").load(SHIPPED_DATA.read_text())
        for split in content["splits"].values():
            split["clips"] = 1
        side = max(params.train.crop, content["splits"]["train"]["height"])
        content["splits"]["train"] |= {"frames": max(16, params.train.frames), "height": side, "width": side}
        YAML(typ="safe").dump(content, raw / "dataset.yaml")
        prepare(raw, folder / PREPARED)
    return Trainee(folder, name, every, lineage_of(params, PreparedData.open(folder / PREPARED)))


def clean_up() -> None:
    """Remove every trace of this drill, and of earlier ones that were themselves killed: versions, runs, objects, folders."""
    for folder in sorted(SCRATCH.glob(f"{PREFIX}*")):
        registry = Curator(Lineage(folder.name, "", {}))
        # The objects first, while the registry still says where they are, and the folder, by which the next drill knows of this one, last.
        addresses = registry.addresses()
        objects = sum(S3Store(address).clear() for address in addresses)
        versions, runs = registry.forget()
        shutil.rmtree(folder)
        log.info("removed %s: %d registered versions, %d runs, %d objects in the store, and %s", folder.name, versions, runs, objects, folder)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: with everything cleaned up."""
    before: Callable | int | None = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
