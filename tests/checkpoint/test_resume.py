"""Which checkpoint a training continues from: the newest whose bytes are right, wherever they are."""

import dataclasses
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.policy import ResumePolicy
from vrt.checkpoint.resume import Candidate, Decision, Evidence, Registered, Side, Source, State, candidates, decide, newest_healthy


def at(step: int) -> Registered:
    return Registered(step, f"digest of {step}", f"s3://bucket/{step}")


@pytest.mark.parametrize(
    "local, registered, last_step, expected",
    [
        ([], [], 100, []),
        ([40], [], 100, [(40, True, False)]),
        ([], [40], 100, [(40, False, True)]),
        ([40, 20], [20, 40], 100, [(40, True, True), (20, True, True)]),
        ([20], [40], 100, [(40, False, True), (20, True, False)]),
        ([40], [20], 100, [(40, True, False), (20, False, True)]),
        ([9, 100], [20], 100, [(100, True, False), (20, False, True), (9, True, False)]),
        # A shorter training than before: what lies beyond its end is not its business.
        ([40, 60], [50], 40, [(40, True, False)]),
    ],
)
def test_candidates_are_all_known_steps_newest_first(local, registered, last_step, expected):
    found = candidates(local, {step: at(step) for step in registered}, last_step)
    assert [(one.step, one.local, one.registered is not None) for one in found] == expected


steps = st.lists(st.integers(1, 30), max_size=8)


@given(local=steps, registered=steps, last_step=st.integers(1, 30))
def test_candidates_lose_and_invent_nothing(local, registered, last_step):
    known = {step: at(step) for step in registered}
    found = candidates(local, known, last_step)
    assert {one.step for one in found} == {step for step in {*local, *registered} if step <= last_step}
    assert all(before.step > after.step for before, after in zip(found, found[1:]))
    assert all(one == Candidate(one.step, one.step in local, known.get(one.step)) for one in found)


class FolderStore:
    """A store in a local folder: real bytes, and an outage at will."""

    def __init__(self, path: Path):
        self.path = path
        self.down = False

    def publish(self, manifest: Manifest, folder: Path) -> str:
        there = self.path / str(manifest.step)
        shutil.copytree(folder, there, ignore=lambda _, names: {name for name in names if not name.startswith(f"{manifest.step}_")})
        return str(there)

    def manifest(self, address: str) -> Manifest:
        self._answer()
        path = next(Path(address).glob("*_manifest.json"), None)
        if path is None:
            raise CheckpointError(f"{address}: the store refused (404)")
        return Manifest.from_bytes(path.read_bytes(), address)

    def fetch(self, address: str, file: FileEntry, path: Path) -> None:
        self._answer()
        shutil.copy(Path(address) / file.name, path)

    def _answer(self) -> None:
        if self.down:
            raise StoreUnavailable("the store is down")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def registered(folder, store, commit):
    """Commits, publishes and registers steps; returns what the registry then knows."""

    def make(*steps: int) -> dict[int, Registered]:
        manifests = [commit(folder, step) for step in steps]
        return {one.step: Registered(one.step, one.digest, store.publish(one, folder.path)) for one in manifests}

    return make


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_nothing_anywhere_is_a_fresh_start(folder, store, lineage):
    assert newest_healthy(folder, lineage, {}, store, 100) is None


def test_the_newest_healthy_checkpoint_wins(folder, store, registered, commit, lineage):
    known = registered(20, 40)
    newest = commit(folder, 60)
    store.down = True
    assert newest_healthy(folder, lineage, known, store, 100) == newest
    assert newest_healthy(folder, lineage, known, store, 59).step == 40


def test_a_machine_without_any_files_fetches_the_newest(store, registered, tmp_path, lineage):
    known = registered(20, 40)
    empty = CheckpointFolder(tmp_path / "another machine")
    empty.prepare()
    assert newest_healthy(empty, lineage, known, store, 100).step == 40
    assert empty.steps() == [40]
    assert empty.problems(40, lineage) == []


@pytest.mark.parametrize("harm", ["altered", "short", "missing", "manifest altered", "manifest gone", "other content"])
def test_a_damaged_local_checkpoint_is_repaired_from_the_registered_copy(folder, store, registered, commit, lineage, caplog, harm: str):
    known = registered(20, 40)
    file = folder.path / ("40_manifest.json" if "manifest" in harm else "40_G.pth")
    if harm == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm in ("missing", "manifest gone"):
        file.unlink()
    elif harm == "other content":
        commit(folder, 40, text=" of another training")
    else:
        damage(file)
    manifest = newest_healthy(folder, lineage, known, store, 100)
    assert (manifest.step, manifest.digest) == (40, known[40].digest)
    assert folder.problems(40, lineage) == []
    if harm != "manifest gone":
        assert "local checkpoint 40 is damaged" in caplog.text
        assert (folder.path / "damaged" / "40-1").is_dir()


def test_a_damaged_checkpoint_that_is_nowhere_else_gives_way_to_an_older_one(folder, store, commit, lineage, caplog):
    commit(folder, 20)
    commit(folder, 40)
    damage(folder.path / "40_G.pth")
    assert newest_healthy(folder, lineage, {}, store, 100).step == 20
    assert "not continuing from step 40: 40_G.pth has other content than the manifest says" in caplog.text
    assert folder.steps() == [20]


def test_a_registered_checkpoint_whose_copy_is_damaged_gives_way_to_an_older_one(folder, store, registered, lineage, caplog):
    known = registered(20, 40)
    damage(folder.path / "40_G.pth")
    damage(Path(known[40].address) / "40_history.jsonl")
    assert newest_healthy(folder, lineage, known, store, 100).step == 20
    assert "its registered copy: 40_history.jsonl has other content" in caplog.text


def test_a_store_that_does_not_answer_is_no_reason_to_go_back(folder, store, registered, lineage):
    # The newest checkpoint is only there: going on from an older one would train its steps again for nothing.
    known = registered(20, 40)
    folder.set_aside(40)
    store.down = True
    with pytest.raises(StoreUnavailable):
        newest_healthy(folder, lineage, known, store, 100)
    store.down = False
    assert newest_healthy(folder, lineage, known, store, 100).step == 40


def test_a_disk_without_room_for_the_newest_is_no_reason_to_go_back(folder, store, registered, lineage, monkeypatch):
    known = registered(20, 40)
    folder.set_aside(40)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "fetch", no_room)
    with pytest.raises((CheckpointError, StoreUnavailable), match="No space left on device"):
        newest_healthy(folder, lineage, known, store, 100)


def test_where_no_checkpoint_is_healthy_each_reason_is_named(folder, store, registered, commit, lineage):
    known = registered(40)
    commit(folder, 20)
    commit(folder, 60, lineage="other-1")
    damage(folder.path / "20_history.jsonl")
    damage(folder.path / "40_G.pth")
    (Path(known[40].address) / "40_manifest.json").unlink()
    with pytest.raises(CheckpointError) as raised:
        newest_healthy(folder, lineage, known, store, 100)
    told = str(raised.value).splitlines()
    assert told[0] == f"{lineage}: no healthy checkpoint among 3:"
    assert told[1] == "  step 60: its manifest is of other-1 step 60"
    assert told[2].startswith("  step 40: 40_G.pth has other content") and "its registered copy: " in told[2] and "404" in told[2]
    assert told[3] == "  step 20: 20_history.jsonl has other content than the manifest says (SHA-256 differs)"
    assert (
        told[4] == f"restore one of them, or start over under another `name` in the params file; damaged local files are in {folder.path / 'damaged'}"
    )


def test_a_manifest_in_the_store_that_is_not_the_registered_one_is_refused(folder, store, registered, lineage):
    known = registered(40)
    folder.set_aside(40)
    known[40] = dataclasses.replace(known[40], digest="0" * 64)
    with pytest.raises(CheckpointError, match=f"the manifest at {known[40].address} is not the one registered"):
        newest_healthy(folder, lineage, known, store, 100)


def test_a_second_try_does_not_start_over_silently_either(folder, store, commit, lineage):
    commit(folder, 20)
    damage(folder.path / "20_G.pth")
    for told in ("no healthy checkpoint among 1", "its only checkpoints are damaged, in .*/damaged; restore one, or remove that folder"):
        with pytest.raises(CheckpointError, match=told):
            newest_healthy(folder, lineage, {}, store, 100)


LOST = Evidence(Side(State.DAMAGED, ("G is short",)), Side(State.MISSING))
HERE = Evidence(Side(State.HEALTHY), Side(State.MISSING))
THERE = Evidence(Side(State.DAMAGED, ("G is short",)), Side(State.HEALTHY))
CODE = Evidence(Side(State.UNUSABLE, ("G.pth: a pickle of code",)), Side(State.MISSING))
STEPS = {60: LOST, 50: CODE, 40: THERE, 20: HERE}


def known(steps=STEPS) -> list[Candidate]:
    return [Candidate(step, True, None) for step in steps]


def outcome(text: str, steps=STEPS) -> tuple[Decision, list[int]]:
    """The decision of the policy, and the steps it looked at."""
    looked = []

    def examine(candidate: Candidate) -> Evidence:
        looked.append(candidate.step)
        return steps[candidate.step]

    return decide(ResumePolicy.parse(text), "tiny-1", known(steps), examine), looked


@pytest.mark.parametrize("text", ["auto", "must", "fork other-1@5"])
def test_the_newest_healthy_wins_each_newer_one_is_named_and_no_older_one_looked_at(text):
    decision, looked = outcome(text)
    assert (decision.step, decision.source, decision.error) == (40, Source.STORE, "")
    assert [str(one) for one in decision.rejected] == ["step 60: G is short", "step 50: G.pth: a pickle of code"]
    assert looked == [60, 50, 40]


def test_a_step_is_that_step_or_none():
    assert outcome("20") == (Decision(20, Source.LOCAL), [20])
    assert outcome("40")[0].source is Source.STORE
    decision, looked = outcome("60")
    assert decision.error == "tiny-1: resume is 60, which can't be used:\n  step 60: G is short\nother steps: 50, 40, 20"
    assert (decision.step, looked) == (None, [60])
    assert outcome("30")[0].error == "tiny-1: resume is 30, but there is no such checkpoint; found: 60, 50, 40, 20"


def test_never_and_must_each_refuse_what_they_are_for():
    decision, looked = outcome("never")
    assert decision.error.startswith("tiny-1: resume is never, but there are checkpoints up to step 60, which a start at step 1 would only repeat; ")
    assert looked == []
    assert outcome("never", {}) == (Decision(), [])
    assert outcome("must", {})[0].error.startswith("tiny-1: resume is must, but there is no checkpoint of this training in the registry, ")
    assert outcome("auto", {}) == (Decision(), [])
    assert "no healthy checkpoint among 2" in outcome("must", {60: LOST, 50: CODE})[0].error


evidences = st.sampled_from([LOST, HERE, THERE, CODE])


@given(st.dictionaries(st.integers(1, 99), evidences, max_size=8))
def test_whatever_is_found_the_decision_is_the_newest_healthy_and_nothing_is_passed_over_silently(found):
    steps = dict(sorted(found.items(), reverse=True))
    decision, looked = outcome("auto", steps)
    healthy = [step for step, evidence in steps.items() if evidence in (HERE, THERE)]
    assert decision.step == (max(healthy) if healthy else None)
    assert bool(decision.error) == (bool(steps) and not healthy)
    assert [one.step for one in decision.rejected] == [step for step in steps if not healthy or step > decision.step]


def test_what_no_training_can_continue_from_gives_way_and_is_never_registered(folder, store, registered, commit, lineage, caplog):
    known = registered(20)
    commit(folder, 40)
    commit(folder, 60)

    def load(manifest: Manifest) -> None:
        if manifest.step > 20:
            raise CheckpointError(f"{manifest.step}_G.pth: can't be read as tensors and plain values")

    told = []
    assert newest_healthy(folder, lineage, known, store, 100, load=load, tell=told.append).step == 20
    assert [one.step for one in told[0].rejected] == [60, 40]
    assert "not continuing from step 60: 60_G.pth: can't be read as tensors" in caplog.text
    # The outbox is the folder: what is aside is not published.
    assert folder.steps() == [20]


def test_an_unusable_one_that_is_registered_stays_where_it_is(folder, store, registered, lineage):
    known = registered(20, 40)

    def load(manifest: Manifest) -> None:
        if manifest.step == 40:
            raise CheckpointError("another network")

    assert newest_healthy(folder, lineage, known, store, 100, load=load).step == 20
    assert folder.steps() == [40, 20]
    folder.delete(40)
    assert newest_healthy(folder, lineage, known, store, 100, load=load).step == 20


def test_what_was_published_and_not_registered_is_a_candidate_too(folder, store, registered, commit, lineage):
    known = registered(20)
    newest = commit(folder, 40)
    address = store.publish(newest, folder.path)
    folder.delete(40)
    assert newest_healthy(folder, lineage, known, store, 100).step == 20
    held = []
    assert newest_healthy(folder, lineage, known, store, 100, published={40: address}, hold=held.append) == newest
    assert held == [], "nobody prunes what is not registered"
    # Another training's, at the same address: not ours.
    folder.delete(40)
    shutil.rmtree(address)
    address = store.publish(commit(folder, 40, lineage="other-1"), folder.path)
    folder.delete(40)
    assert newest_healthy(folder, lineage, known, store, 100, published={40: address}).step == 20


def test_an_older_step_is_gone_back_to_and_a_registered_one_is_held_while_it_is_fetched(folder, store, registered, lineage):
    known = registered(20, 40)
    folder.delete(20)
    held = []

    @contextmanager
    def hold(step: int):
        held.append((step, folder.steps()))
        yield
        held.append((step, folder.steps()))

    manifest = newest_healthy(folder, lineage, known, store, 100, policy=ResumePolicy.parse("20"), hold=hold)
    assert manifest.step == 20
    assert held == [(20, [40]), (20, [40, 20])]
