"""Publishing behind the training: everything arrives, in order, whatever fails meanwhile; or it is said what is missing."""

import threading
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from vrt.checkpoint import publisher as module
from vrt.checkpoint.errors import CheckpointError, LeaseLost, Missing, StoreRefuses, StoreUnavailable
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.resume import Registered


class Recorder:
    """Store and registry in one: writes down what arrives, in order, after failing as told. `block` holds every call until it is set."""

    def __init__(self, *failures: Exception):
        self.arrived: list = []
        self.calls = 0
        self.block = threading.Event()
        self.block.set()
        self._failures = deque(failures)
        self._changed = threading.Condition()

    def _call(self, *arrived) -> None:
        assert self.block.wait(60)
        with self._changed:
            self.calls += 1
            if self._failures and (failure := self._failures.popleft()):
                raise failure
            self.arrived += arrived
            self._changed.notify_all()

    def wait_for(self, what: tuple) -> None:
        """Until `what` arrived: at the end of a training the publisher tries less often than these tests can wait."""
        with self._changed:
            assert self._changed.wait_for(lambda: what in self.arrived, 60)

    def publish(self, manifest: Manifest, folder: Path) -> str:
        self._call(("published", manifest.step))
        return f"s3://bucket/{manifest.step}"

    def upload(self, step: int, file: FileEntry, folder: Path) -> None:
        self._call(("uploaded ahead", step, file.name))

    def registered(self) -> dict[int, object]:
        return {}

    def check(self, manifest: Manifest) -> None:
        self._call()

    def register(self, manifest: Manifest, address: str, folder: Path) -> None:
        self._call(("registered", manifest.step, address))

    def send(self, rows: list[dict[str, float]]) -> None:
        self._call(*(("sent", row["step"]) for row in rows))

    def note(self, key: str, text: str) -> None:
        self._call(("noted", key, text))

    def manifest(self, address: str) -> Manifest:
        raise NotImplementedError

    def fetch(self, address: str, file: FileEntry, path: Path) -> None:
        raise NotImplementedError

    def problems(self, address: str, manifest: Manifest, advance) -> list[str]:
        return []

    def delete(self, address: str) -> None:
        self._call(("deleted", address))

    def unregister(self, step: int) -> None:
        self._call(("unregistered", step))

    def pin(self, step: int, pinned: bool) -> None:
        self._call(("pinned", step))


def registered_with_other_content(recorder: Recorder, theirs: Manifest, **facts: object) -> None:
    recorder.registered = lambda: {theirs.step: Registered(theirs.step, theirs.digest, f"s3://bucket/{theirs.step}", **facts)}
    recorder.manifest = lambda address: theirs


def with_other(manifest: Manifest, file: str) -> Manifest:
    """The manifest of a checkpoint that differs in one file."""
    files = tuple(replace(entry, sha256="0" * 64) if entry.name.endswith(file) else entry for entry in manifest.files)
    assert files != manifest.files
    return replace(manifest, files=files)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SENDS", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def publishing(folder):
    """Starts a publisher to a recorder; lets it end with the test."""
    recorders = []

    def start(recorder: Recorder) -> Publisher:
        recorders.append(recorder)
        publisher = Publisher(folder, recorder, recorder)
        publisher.start()
        return publisher

    yield start
    for recorder in recorders:
        recorder.block.set()


def both(step: int) -> list[tuple]:
    return [("published", step), ("registered", step, f"s3://bucket/{step}")]


def test_metrics_come_before_the_checkpoint_whose_steps_they_describe(publishing, folder, commit):
    recorder = Recorder()
    recorder.block.clear()
    publisher = publishing(recorder)
    for step in (1, 2):
        publisher.send({"step": step})
    publisher.publish(commit(folder, 2))
    recorder.block.set()
    assert publisher.finish(60) == []
    assert recorder.arrived == [("sent", 1), ("sent", 2), *both(2)]


@pytest.mark.parametrize("down", range(1, 12))
def test_all_arrives_once_and_in_order_after_an_outage_at_any_moment(publishing, folder, commit, down: int):
    # Calls fail from number `down` on, for a while; one of them with an error that nobody foresaw.
    recorder = Recorder(*[None] * (down - 1), StoreUnavailable("down"), ValueError("a bug"), StoreUnavailable("down"))
    recorder.block.clear()
    publisher = publishing(recorder)
    for step in (1, 2, 3):
        publisher.send({"step": step})
        publisher.publish(commit(folder, step))
    publisher.note("failed_save", "the disk was full")
    recorder.block.set()
    recorder.wait_for(both(3)[1])
    assert publisher.finish(60) == []
    sent = [what for what in recorder.arrived if what[0] == "sent"]
    assert sent == [("sent", 1), ("sent", 2), ("sent", 3)]
    assert recorder.arrived.count(("noted", "failed_save", "the disk was full")) == 1
    registered = [what[1] for what in recorder.arrived if what[0] == "registered"]
    assert registered == [1, 2, 3]
    for step in (1, 2, 3):
        # Publishing is repeated where registering failed, and is always first; the metrics are always before both.
        assert recorder.arrived.index(("sent", step)) < recorder.arrived.index(("published", step))
        assert recorder.arrived.index(("published", step)) < recorder.arrived.index(both(step)[1])


def test_an_outage_is_told_once_not_at_every_try(publishing, folder, commit, caplog):
    recorder = Recorder(*[StoreUnavailable("the store is down")] * 5)
    publisher = publishing(recorder)
    publisher.publish(commit(folder, 40))
    recorder.wait_for(both(40)[1])
    assert publisher.finish(60) == []
    assert recorder.calls == 7
    assert caplog.text.count("publishing is held up, training goes on: the store is down") == 1


def test_a_refused_checkpoint_is_reported_and_holds_up_no_other(publishing, folder, commit):
    recorder = Recorder(CheckpointError("wrong credentials"))
    publisher = publishing(recorder)
    publisher.publish(commit(folder, 20))
    publisher.publish(commit(folder, 40))
    assert publisher.finish(60) == ["step 20: wrong credentials"]
    assert not publisher.may_arrive_later
    assert recorder.arrived == both(40)


def test_what_did_not_arrive_in_time_is_named(publishing, folder, commit):
    recorder = Recorder(*[StoreUnavailable("the store is down")] * 1000)
    publisher = publishing(recorder)
    publisher.send({"step": 1})
    publisher.send({"step": 2})
    publisher.publish(commit(folder, 20))
    publisher.publish(commit(folder, 40))
    down = "the store is down"
    assert publisher.finish(0.1) == [f"step 20: {down}", f"step 40: {down}", f"metrics of 2 steps: {down}"]
    assert publisher.may_arrive_later


@pytest.mark.parametrize("error", [OSError("the disk is gone"), StoreRefuses("the key is no more")])
def test_what_needs_a_person_may_never_arrive(publishing, folder, commit, error: Exception):
    publisher = publishing(Recorder(*[error] * 100_000))
    publisher.publish(commit(folder, 20))
    assert publisher.finish(0.1) == [f"step 20: {error}"]
    assert not publisher.may_arrive_later


def test_a_store_that_hangs_does_not_hold_the_end_of_the_training(publishing, folder, commit):
    recorder = Recorder()
    recorder.block.clear()
    publisher = publishing(recorder)
    publisher.publish(commit(folder, 20))
    assert publisher.finish(0.1) == ["step 20: not published in time"]
    assert publisher.may_arrive_later


@pytest.mark.parametrize("spoilt, missing", [("history.jsonl", []), ("G.pth", ["step 2: step 2 is registered with other content"])])
def test_a_step_registered_with_the_same_weights_and_other_metrics_stays_as_it_is(publishing, folder, commit, spoilt: str, missing: list[str]):
    # As one that was saved when its training was told to stop, and not validated.
    manifest = commit(folder, 2)
    recorder = Recorder(CheckpointError("step 2 is registered with other content"))
    registered_with_other_content(recorder, with_other(manifest, spoilt))
    publisher = publishing(recorder)
    publisher.publish(manifest)
    assert publisher.finish(60) == missing
    # Nothing of it was touched, in the store or the registry; but `save/registered_s` is sent.
    assert [what for what in recorder.arrived if what[0] != "sent"] == []


@pytest.mark.parametrize("lost", ["a file", "the manifest"])
@pytest.mark.parametrize("spoilt", ["history.jsonl", "G.pth"])
def test_a_step_whose_registered_copy_is_lost_gives_way_to_the_sound_one(publishing, folder, commit, caplog, spoilt: str, lost: str):
    manifest, recorder = commit(folder, 2), Recorder()
    registered_with_other_content(recorder, with_other(manifest, spoilt), pinned=True)
    if lost == "a file":
        recorder.problems = lambda address, manifest, advance: ["2_G.pth is missing"]
    else:
        recorder.manifest = lambda address: (_ for _ in ()).throw(Missing("2_manifest.json is missing"))
    publisher = publishing(recorder)
    publisher.publish(manifest)
    assert publisher.finish(60) == []
    expected = [("unregistered", 2), ("deleted", "s3://bucket/2"), *both(2), ("pinned", 2)]
    assert [what for what in recorder.arrived if what[0] != "sent"] == expected
    reason = "2_G.pth is missing" if lost == "a file" else "the store has nothing of it"
    assert f"checkpoint 2 is registered with other content, which is lost ({reason}): this one takes its place" in caplog.text


def test_metrics_that_are_refused_for_good_are_told_and_hold_up_no_checkpoint(publishing, folder, commit):
    class Refusing(Recorder):
        def send(self, rows):
            raise ValueError("no such metric")

    recorder = Refusing()
    publisher = publishing(recorder)
    publisher.send({"step": 2})
    publisher.publish(commit(folder, 2))
    assert publisher.finish(60) == ["metrics of steps 2 to 2: no such metric"]
    assert not publisher.may_arrive_later
    assert ("registered", 2, "s3://bucket/2") in recorder.arrived


def test_a_lost_local_file_is_told_and_holds_up_no_later_checkpoint(publishing, folder, commit):
    recorder = Recorder()
    lost, sound = commit(folder, 2), commit(folder, 4)
    (folder.path / lost.files[0].name).unlink()
    publisher = publishing(recorder)
    publisher.publish(lost)
    publisher.publish(sound)
    assert publisher.finish(60) == [f"step 2: {lost.files[0].name} is missing"]
    assert [what[1] for what in recorder.arrived if what[0] == "registered"] == [4]


def test_who_is_told_to_stop_does_not_wait_for_a_store_that_is_down(publishing, folder, commit, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_IN_A_HURRY", 0.1)
    publisher = publishing(Recorder(*[StoreUnavailable("down")] * 100_000))
    publisher.publish(commit(folder, 2))
    assert publisher.finish(3600, hurry=lambda: True) == ["step 2: down"]


def test_a_file_is_uploaded_while_the_rest_of_its_step_is_being_written(publishing, folder, lineage):
    recorder = Recorder()
    publisher = publishing(recorder)

    def second(file):
        recorder.wait_for(("uploaded ahead", 40, "40_G.pth"))
        file.write(b"second")

    contents = {"G.pth": lambda file: file.write(b"first"), "E.pth": second}
    manifest = folder.commit(40, contents, lambda files: Manifest(lineage, 40, files, {}, {}, {}), lambda file: publisher.ahead(40, file))
    publisher.publish(manifest)
    assert publisher.finish(60) == []
    assert [what[0] for what in recorder.arrived if what[0] != "uploaded ahead"] == ["published", "registered"]


def test_nothing_of_a_registered_step_is_uploaded_before_it_is_known_to_be_the_same(publishing, folder, commit):
    class Known(Recorder):
        def registered(self):
            return {40: object()}

    recorder = Known()
    publisher = publishing(recorder)
    manifest = commit(folder, 40)
    for file in manifest.files:
        publisher.ahead(40, file)
    publisher.ahead(60, manifest.files[0])
    recorder.wait_for(("uploaded ahead", 60, "40_G.pth"))
    assert publisher.finish(60) == []
    assert [what[1] for what in recorder.arrived] == [60]


@pytest.mark.parametrize("error", [StoreUnavailable("down"), FileNotFoundError(2, "No such file or directory")])
def test_an_upload_ahead_that_fails_is_made_up_for(publishing, folder, commit, error):
    class FailsAhead(Recorder):
        def upload(self, step, file, folder):
            raise error

    recorder = FailsAhead()
    publisher = publishing(recorder)
    manifest = commit(folder, 40)
    publisher.ahead(40, manifest.files[0])
    publisher.publish(manifest, started=0.0)
    recorder.wait_for(both(40)[1])
    assert publisher.finish(60) == []
    # How long the registration took is a metric of the step.
    assert recorder.arrived == [*both(40), ("sent", 40)]


class FencedOut:
    """A lease that is lost after the first `asked` questions."""

    def __init__(self, asked: int):
        self._left, self.lost = asked, None

    def validate(self):
        self._left -= 1
        if self._left < 0:
            self.lost = LeaseLost("process 7 on elsewhere has taken over")
            raise self.lost


@pytest.mark.parametrize("asked, arrived", [(0, []), (1, [("published", 2)]), (2, both(2))])
def test_who_lost_the_lineage_registers_nothing_more_and_says_why(folder, commit, asked: int, arrived: list):
    recorder = Recorder()
    publisher = Publisher(folder, recorder, recorder, fence=FencedOut(asked))
    publisher.publish(commit(folder, 2))
    publisher.publish(commit(folder, 4))
    publisher.start()
    missing = publisher.finish(60)
    assert [reason for reason in missing if "taken over" not in reason] == []
    assert len(missing) == (1 if asked == 2 else 2)
    assert recorder.arrived == arrived
    assert "taken over" in str(publisher.lost)


def test_who_is_taken_for_dead_while_it_looks_at_a_registered_copy_deletes_nothing(folder, commit):
    manifest, recorder = commit(folder, 2), Recorder()
    registered_with_other_content(recorder, with_other(manifest, "G.pth"))
    recorder.problems = lambda address, manifest, advance: ["2_G.pth is missing"]
    publisher = Publisher(folder, recorder, recorder, fence=FencedOut(1))
    publisher.publish(manifest)
    publisher.start()
    assert len(publisher.finish(60)) == 1
    assert recorder.arrived == []
