"""Which checkpoint a training continues from: the newest whose bytes are right, wherever they are."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.resume import Candidate, Registered, candidates, newest_healthy


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
