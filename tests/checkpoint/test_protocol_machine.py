"""The protocol under thousands of interleavings: commit, publish, register, damage, outages, and a death anywhere in between.

Everything of ours is the real thing, down to the calls of boto3 and MLflow: the two servers alone are models, kept in memory, so that a
thousand deaths take seconds. What real servers do with real kills is the subject of tests/stages/test_kill_matrix.py.
"""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vrt.checkpoint import phases
from vrt.checkpoint.curator import Curator
from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.phases import KILL_AT, Phase, reached
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.resume import newest_healthy
from vrt.checkpoint.retention import prune
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import Lineage
from vrt.params import Checkpoints

LINEAGE = Lineage("machine", "0123456789", {})
PREFIX = "s3://bucket/run/checkpoints"
LAST_STEP = 1000


class S3:
    """An S3 server, as far as boto3's client shows it to us. A put is there as a whole or not at all."""

    exceptions = SimpleNamespace(ClientError=ClientError)

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.down = False

    def _found(self, key: str) -> bytes:
        self._answer()
        if key not in self.objects:
            answer = {"Error": {"Code": "NoSuchKey"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
            raise ClientError(answer, "GetObject")
        return self.objects[key]

    def _answer(self) -> None:
        if self.down:
            raise EndpointConnectionError(endpoint_url="http://store")

    def head_object(self, Bucket: str, Key: str) -> dict:  # noqa: N803
        return {"ContentLength": len(self._found(Key))}

    def get_object(self, Bucket: str, Key: str, Range: str | None = None) -> dict:  # noqa: N803
        content = self._found(Key)
        if Range:
            first, last = map(int, Range.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        body = io.BytesIO(content)
        return {"Body": SimpleNamespace(read=body.read, iter_chunks=lambda size: iter(lambda: body.read(size), b"")), "ContentLength": len(content)}

    def get_paginator(self, operation: str) -> SimpleNamespace:
        self._answer()

        def paginate(Bucket: str, Prefix: str) -> list[dict]:  # noqa: N803
            return [{"Contents": [{"Key": key, "LastModified": datetime.now(UTC)} for key in self.objects if key.startswith(Prefix)]}]

        return SimpleNamespace(paginate=paginate)

    def delete_object(self, Bucket: str, Key: str) -> None:  # noqa: N803
        self._answer()
        self.objects.pop(Key, None)

    def put_object(self, Bucket: str, Key: str, Body: bytes) -> None:  # noqa: N803
        self._answer()
        self.objects[Key] = Body

    def upload_file(self, path: str, bucket: str, key: str, Callback: Callable[[int], None]) -> None:  # noqa: N803
        self._answer()
        content = Path(path).read_bytes()
        Callback(len(content))
        self.objects[key] = content


@dataclass(frozen=True)
class Version:
    version: str
    tags: dict[str, str]
    source: str


class Mlflow:
    """An MLflow server, as far as its client shows it to us: like the real one it takes a second version of the same step without a word."""

    def __init__(self) -> None:
        self.versions: list[Version] = []
        self.aliases: dict[str, str] = {}
        self.down = False

    def create_registered_model(self, name: str) -> None: ...

    def search_model_versions(self, mine: str, max_results: int) -> list[Version]:
        class Page(list):
            token = None

        return Page(self.versions)

    def create_model_version(self, name: str, source: str, tags: dict[str, str], **_: object) -> None:
        number = max((int(version.version) for version in self.versions), default=0) + 1
        self.versions.append(Version(str(number), tags, source))

    def delete_model_version(self, name: str, version: str) -> None:
        self.versions = [each for each in self.versions if each.version != version]
        self.aliases = {alias: led_to for alias, led_to in self.aliases.items() if led_to != version}

    def get_registered_model(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(aliases=dict(self.aliases))

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.aliases[alias] = version

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        del self.aliases[alias]


class Registry(Curator):
    def __init__(self, server: Mlflow):
        super().__init__(LINEAGE)
        self._server = server

    @contextmanager
    def guarded(self) -> Iterator[Mlflow]:
        if self._server.down:
            raise StoreUnavailable("MLflow does not answer")
        yield self._server


class Died(BaseException):
    """The process ends here; what its handlers do on the way out did not happen (see Machine.dying)."""


@dataclass
class Trainer:
    """One process: what is lost with it."""

    publisher: Publisher
    step: int


def content(step: int, machine: str) -> bytes:
    """The weights that a kind of machine computes for a step."""
    return f"step {step} computed by {machine}".encode() * 20


def deaths(*among: Phase) -> st.SearchStrategy[str | None]:
    """None, or the phase and the count at which to die."""
    return st.none() | st.tuples(st.sampled_from(among), st.integers(1, 4)).map(lambda death: f"{death[0]}:{death[1]}")


class Machine(RuleBasedStateMachine):
    saving = deaths(Phase.WRITE, Phase.FSYNC, Phase.RENAME, Phase.MANIFEST, Phase.COMMITTED)
    publishing = deaths(Phase.UPLOAD, Phase.READ_BACK, Phase.REGISTER, Phase.ALIAS)
    starting = deaths(Phase.DOWNLOAD, Phase.REPAIR)

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a place: no death here can show a missing fsync, and thousands of them take minutes on a busy disk.
        self.place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.folder = CheckpointFolder(self.place / "checkpoints")
        self.s3, self.mlflow = S3(), Mlflow()
        self.store, self.registry = S3Store(PREFIX), Registry(self.mlflow)
        self.store._client = self.s3
        self.trainer: Trainer | None = None
        self.predecessor: Trainer | None = None
        self.moves = 0
        self.machine = "a"
        self.digests: dict[int, str] = {}
        """What was ever registered, by step."""
        self.harmed_there: set[int] = set()
        self.harmed_here: set[int] = set()
        self.kill, phases._die = phases._die, self.dying

    def teardown(self) -> None:
        try:
            self.whatever_is_committed_is_registered_in_the_end()
        finally:
            phases._die = self.kill
            shutil.rmtree(self.place)

    # How a process dies

    def dying(self, _armed: str) -> None:
        """Remember the world as the process leaves it, then leave; `until_death` undoes what handlers do on the way."""
        shutil.copytree(self.folder.path, self.place / "left")
        self.left = dict(self.s3.objects), list(self.mlflow.versions), dict(self.mlflow.aliases)
        raise Died

    def until_death(self, death: str | None, work: Callable[[], None]) -> None:
        phases._counts.clear()
        os.environ[KILL_AT] = death or ""
        try:
            work()
        except Died:
            self.trainer = None
            shutil.rmtree(self.folder.path)
            (self.place / "left").rename(self.folder.path)
            self.s3.objects, self.mlflow.versions, self.mlflow.aliases = self.left
        finally:
            os.environ[KILL_AT] = ""

    # What a trainer does

    @initialize(steps=st.integers(0, 3))
    def first_steps(self, steps: int) -> None:
        self.start(None)
        self.some_steps_without_trouble(steps)

    @precondition(lambda self: self.trainer is not None)
    @rule(steps=st.integers(1, 3))
    def some_steps_without_trouble(self, steps: int) -> None:
        self.s3.down = self.mlflow.down = False
        for _ in range(steps):
            self.save(None)
            self.publish(None)

    @precondition(lambda self: self.trainer is None)
    @rule(death=starting)
    def start(self, death: str | None) -> None:
        registered = {int(version.tags["step"]) for version in self.mlflow.versions}
        expected = max((step for step in registered if self.is_healthy(step)), default=0)
        self.until_death(death, lambda: self._start(expected))

    def _start(self, expected: int) -> None:
        self.folder.prepare()
        try:
            registered = self.registry.registered()
            manifest = newest_healthy(self.folder, LINEAGE.id, registered, self.store, LAST_STEP)
        except StoreUnavailable:
            assert self.s3.down or self.mlflow.down
            return
        step = manifest.step if manifest else 0
        assert step >= expected, f"went back to {step}, though {expected} is registered and healthy"
        if manifest:
            assert self.is_sound_here(step), f"continues from step {step}, which is damaged"
        self.harmed_here &= set(self.folder.steps())
        self.harmed_here.discard(step)
        self.trainer = Trainer(Publisher(self.folder, self.store, self.registry), step)
        for unregistered in sorted(set(self.folder.steps()) - registered.keys()):
            if not self.folder.problems(unregistered, LINEAGE.id):
                self.trainer.publisher.publish(self.folder.manifest(unregistered))

    @precondition(lambda self: self.trainer is not None)
    @rule(death=saving)
    def save(self, death: str | None) -> None:
        self.until_death(death, self._save)

    def _save(self) -> None:
        self.trainer.step += 1
        step = self.trainer.step
        weights = content(step, self.machine)
        contents = {"G.pth": lambda file: file.write(weights), "history.jsonl": lambda file: file.write(b"history" + weights)}
        manifest = self.folder.commit(step, contents, lambda files: Manifest(LINEAGE.id, step, files, {}, {}, {"machine": self.machine}))
        self.harmed_here.discard(step)
        reached(Phase.COMMITTED)
        self.trainer.publisher.publish(manifest)

    @precondition(lambda self: self.trainer is not None)
    @rule(death=publishing)
    def publish(self, death: str | None) -> None:
        """One round of the publisher's thread."""
        self.until_death(death, self._publish)

    @precondition(lambda self: self.trainer is not None)
    @rule(death=publishing)
    def save_and_publish(self, death: str | None) -> None:
        self.save(None)
        self.publish(death)

    def _publish(self) -> None:
        self._work(self.trainer)

    def _work(self, trainer: Trainer) -> None:
        try:
            trainer.publisher._work()
        except StoreUnavailable:
            assert self.s3.down or self.mlflow.down
        # Publishing again mends what was harmed in the store.
        self.harmed_there = {step for step in self.harmed_there if self.store_problems(step)}

    # What happens to it

    @precondition(lambda self: self.trainer is not None)
    @rule()
    def killed_between_two_calls(self) -> None:
        self.trainer = None

    @precondition(lambda self: not self.digests or not all(map(self.store_problems, self.digests)))
    @rule(kind=st.sampled_from("ab"))
    def move_to_an_empty_machine(self, kind: str) -> None:
        """Of the same kind or another, which computes other bits. Its predecessor was thought dead, and need not be."""
        self.predecessor, self.trainer, self.machine = self.trainer, None, kind
        self.moves += 1
        self.folder = CheckpointFolder(self.place / f"machine-{self.moves}")
        self.folder.prepare()
        self.harmed_here.clear()

    @precondition(lambda self: self.trainer is not None)
    @rule(kind=st.sampled_from("ab"))
    def two_trainers_come_to_the_same_step(self, kind: str) -> None:
        """The predecessor has committed a step and published nothing of it when its successor, elsewhere, gets there too."""
        self.outage("none")
        self.publish(None)
        if all(map(self.store_problems, self.digests)):
            # An empty machine would have nothing to continue from but a person's decision.
            return
        self.save(None)
        self.move_to_an_empty_machine(kind)
        self.start(None)
        while self.trainer.step < self.predecessor.step:
            self.save(None)

    @precondition(lambda self: self.predecessor is not None)
    @rule()
    def the_predecessor_publishes_what_it_had(self) -> None:
        self._work(self.predecessor)

    @rule(data=st.data(), where=st.sampled_from(["here", "there", "both"]), cut=st.booleans())
    def damage(self, data, where: str, cut: bool) -> None:
        """Spoil a file of the newest checkpoint, or of any, in the folder, in the store, or in both."""
        steps = sorted({*self.folder.steps(), *self.digests}, reverse=True)
        step = data.draw(st.sampled_from(steps[:1] * 3 + steps)) if steps else 0
        if where != "there" and step in self.folder.steps() and self.can_be_spared(step, here=True):
            path = data.draw(st.sampled_from(sorted(self.folder.path.glob(f"{step}_*"))))
            path.write_bytes(spoiled(path.read_bytes(), cut))
            self.harmed_here.add(step)
        if where != "here" and step in self.digests and self.can_be_spared(step, here=False):
            key = data.draw(st.sampled_from(sorted(key for key in self.s3.objects if f"/{step:08d}/" in key)))
            self.s3.objects[key] = spoiled(self.s3.objects[key], cut)
            self.harmed_there.add(step)

    @rule(down=st.sampled_from(["store", "registry", "none", "none"]))
    def outage(self, down: str) -> None:
        self.s3.down, self.mlflow.down = down == "store", down == "registry"

    # What is true of a step, by another reading than our own

    def is_healthy(self, step: int) -> bool:
        """A registered step whose right bytes are in the folder or in the store."""
        return not self.store_problems(step) or self.is_sound_here(step)

    def is_sound_here(self, step: int) -> bool:
        return not problems(self.files_here(step), step, self.digests.get(step))

    def files_here(self, step: int) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.path.glob(f"{step}_*")}

    def store_problems(self, step: int) -> list[str]:
        files = {key.rsplit("/", 1)[1]: content for key, content in self.s3.objects.items() if f"/{step:08d}/" in key}
        return problems(files, step, self.digests.get(step))

    def can_be_spared(self, step: int, here: bool) -> bool:
        """A copy that may be harmed: with all copies of all steps gone a person has to decide, which is no subject here."""
        other_copy = not self.store_problems(step) and step in self.digests if here else self.is_sound_here(step)
        return other_copy or any(self.is_healthy(other) for other in self.digests if other != step)

    # What must hold

    @invariant()
    def a_registered_step_has_one_version_and_never_other_bytes(self) -> None:
        steps = [int(version.tags["step"]) for version in self.mlflow.versions]
        assert len(steps) == len(set(steps))
        for version in self.mlflow.versions:
            step, digest = int(version.tags["step"]), version.tags["digest"]
            assert self.digests.setdefault(step, digest) == digest
            if step not in self.harmed_there:
                assert self.store_problems(step) == [], f"step {step} is registered without its bytes"

    @precondition(lambda self: self.trainer is not None and self.mlflow.versions and not (self.s3.down or self.mlflow.down))
    @rule(death=deaths(Phase.PRUNE), keep=st.integers(1, 2))
    def prune(self, death: str | None, keep: int) -> None:
        """What a trainer does after each registration: the newest registered checkpoint was verified just now."""
        before = sorted(int(version.tags["step"]) for version in self.mlflow.versions)
        if self.store_problems(before[-1]):
            return
        policy = Checkpoints(resume="auto", keep_last=keep, keep_every=0, keep_best=0, most_failed_saves=0)
        self.until_death(death, lambda: prune(self.folder, self.store, self.registry, policy))
        left = {int(version.tags["step"]) for version in self.mlflow.versions}
        assert left >= set(before[-keep:])
        # A step that is gone may be registered anew, by a machine of another kind with other bytes.
        self.digests = {step: digest for step, digest in self.digests.items() if step in left}
        self.harmed_there &= left
        self.harmed_here &= set(self.folder.steps())

    @invariant()
    def nothing_registered_is_gone_unless_pruned(self) -> None:
        assert {int(version.tags["step"]) for version in self.mlflow.versions} == set(self.digests)

    @invariant()
    def a_local_manifest_has_its_files(self) -> None:
        for step in self.folder.steps():
            if step not in self.harmed_here:
                assert problems(self.files_here(step), step) == [], f"step {step} is torn"

    def whatever_is_committed_is_registered_in_the_end(self) -> None:
        self.outage("none")
        self.trainer = None
        self.start(None)
        for _ in range(3):
            self.publish(None)
        registered = {int(version.tags["step"]) for version in self.mlflow.versions}
        for step in self.folder.steps():
            assert step in registered or not self.is_sound_here(step), f"step {step} is committed and not registered"
        self.a_registered_step_has_one_version_and_never_other_bytes()


def problems(files: dict[str, bytes], step: int, digest: str | None = None) -> list[str]:
    """Why these are not all of a step's files, with the content that has the `digest` where there is one. Read without our own code's help."""
    try:
        manifest = Manifest.from_bytes(files[f"{step}_manifest.json"], "these files")
    except (CheckpointError, KeyError) as error:
        return [str(error)]
    if digest and manifest.digest != digest:
        return ["another manifest"]
    return [file.name for file in manifest.files if hashlib.sha256(files.get(file.name, b"")).hexdigest() != file.sha256]


def spoiled(content: bytes, cut: bool) -> bytes:
    if not content:
        # What was cut again and again: only growing changes it.
        return b"\0"
    middle = len(content) // 2
    return content[:middle] if cut else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# A failure is shown as it was found: shortening it takes minutes.
HOW = settings(deadline=None, phases=[Stage.generate], suppress_health_check=list(HealthCheck))


class TestProtocol(Machine.TestCase):
    settings = settings(HOW, max_examples=100, stateful_step_count=40, derandomize=True)


@pytest.mark.long
class TestProtocolAtLength(Machine.TestCase):
    settings = settings(HOW, max_examples=1500, stateful_step_count=60)
