"""Saving: the training waits for the copy alone, hears of every failure, and is stopped where going on would lose more."""

import errno
import signal
import threading
from collections.abc import Callable

import pytest
import torch

from vrt.checkpoint.errors import CheckpointError, SavesFail
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.saver import Saver, reason_to_stop


class Heard:
    """Stands for the publisher: writes down what it hears of."""

    def __init__(self):
        self.committed: list[int] = []
        self.ahead_of: list[tuple[int, str]] = []
        self.rows: list[dict[str, float]] = []
        self.notes: list[str] = []

    def publish(self, manifest: Manifest, started: float) -> None:
        self.committed.append(manifest.step)

    def ahead(self, step: int, file: FileEntry) -> None:
        self.ahead_of.append((step, file.name))

    def send(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def note(self, key: str, text: str) -> None:
        self.notes.append(text)

    def metric(self, key: str) -> list[tuple[int, float]]:
        return [(row["step"], row[f"save/{key}"]) for row in self.rows if f"save/{key}" in row]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def save(lineage) -> Callable[..., None]:
    """Saves one number as a step's weights, and waits for it unless told otherwise."""

    def one(saver: Saver, step: int, value: float = 0.0, wait: bool = True) -> None:
        facts = {"lineage": lineage, "metrics": {}, "identity": {}, "origin": {}}
        saver.save(step, {"G.pth": {"layer.weight": torch.full((3,), value)}}, {"history.jsonl": b"{}\n"}, facts)
        if wait:
            saver.wait()

    return one


@pytest.fixture
def fail(folder, monkeypatch) -> Callable[[bool], None]:
    """Lets every write fail from now on as on a full disk, or no more."""
    write = folder._write

    def set_failing(failing: bool) -> None:
        def full(name, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(folder, "_write", full if failing else write)

    return set_failing


def test_each_save_tells_how_long_the_training_waited_and_when_it_was_on_disk(folder, heard, save):
    saver = Saver(folder, heard)
    save(saver, 1)
    save(saver, 2)
    assert heard.committed == folder.steps()[::-1] == [1, 2]
    for key in ("blocked_s", "waited_s", "committed_s"):
        assert [step for step, _ in heard.metric(key)] == [1, 2]
        assert all(0 <= seconds < 60 for _, seconds in heard.metric(key))
    assert heard.metric("failed") == [(1, 0), (2, 0)]
    assert {(1, "1_G.pth"), (1, "1_history.jsonl")} < set(heard.ahead_of)
    assert saver.safe_step == 2 and saver.must_stop is None


def test_a_snapshot_waits_for_the_one_being_written_and_says_so(folder, heard, save, monkeypatch):
    saver, write, go, waiting = Saver(folder, heard), folder.commit, threading.Event(), threading.Event()

    def commit_later(*arguments):
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(folder, "commit", commit_later)
    save(saver, 1, 1.0, wait=False)

    def second():
        waiting.set()
        save(saver, 2, 2.0)

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(60)
    thread.join(0.3)
    assert thread.is_alive(), "it should wait for the first"
    go.set()
    thread.join(60)
    assert dict(heard.metric("waited_s"))[2] > 0.2
    assert dict(heard.metric("waited_s"))[1] < 0.2
    assert [torch.load(folder.path / f"{step}_G.pth")["layer.weight"][0].item() for step in (1, 2)] == [1, 2]


def test_who_is_interrupted_while_it_waits_overwrites_nothing_that_is_being_written(folder, heard, save, monkeypatch):
    saver, write, go, waiting = Saver(folder, heard), folder.commit, threading.Event(), threading.Event()

    def commit_later(*arguments):
        assert go.wait(60)
        return write(*arguments)

    def interrupt(number, frame):
        # As a second Ctrl-C.
        if waiting.is_set():
            threading.Timer(0.3, go.set).start()
        waiting.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "commit", commit_later)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        save(saver, 1, 1.0, wait=False)
        for _ in range(2):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                save(saver, 2, 2.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    save(saver, 2, 2.0)
    assert [torch.load(folder.path / f"{step}_G.pth")["layer.weight"].tolist() for step in (1, 2)] == [[1.0] * 3, [2.0] * 3]


def test_the_training_may_change_its_state_while_it_is_written(folder, heard, lineage, monkeypatch):
    saver, weight, go, write = Saver(folder, heard), torch.zeros(3), threading.Event(), folder.commit

    def commit_later(*arguments):
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(folder, "commit", commit_later)
    saver.save(1, {"G.pth": {"w": weight}}, {"history.jsonl": b"{}\n"}, {"lineage": lineage, "metrics": {}, "identity": {}, "origin": {}})
    weight += 1
    go.set()
    saver.wait()
    assert torch.load(folder.path / "1_G.pth")["w"].tolist() == [0, 0, 0]
    assert folder.problems(1, lineage) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_state_that_is_no_number_is_not_saved_and_stops_the_training(folder, heard, save, value: float):
    saver = Saver(folder, heard)
    save(saver, 20)
    save(saver, 40, value)
    assert folder.steps() == heard.committed == [20]
    told = (
        "step 40: G.pth layer.weight holds values that are no numbers; nothing of this step was saved, the last healthy checkpoint is step 20: "
        "lower optimizer.lr, or look at the data"
    )
    assert isinstance(saver.must_stop, FloatingPointError) and str(saver.must_stop) == told


def test_large_numbers_are_numbers(folder, heard, save):
    # Their sum is not.
    saver = Saver(folder, heard)
    save(saver, 20, 3e38)
    assert folder.steps() == [20]


def test_a_failed_save_is_told_loudly_and_the_next_one_tries_again(folder, heard, save, fail, caplog):
    saver = Saver(folder, heard)
    save(saver, 20)
    fail(True)
    save(saver, 40)
    save(saver, 60)
    failure = f"{folder.path}: step 60 could not be saved (No space left on device); free space there"
    assert isinstance(saver.failure, CheckpointError) and str(saver.failure) == failure
    assert heard.metric("failed") == [(20, 0), (40, 1), (60, 2)]
    assert heard.notes[-1] == failure
    assert f"SAVE FAILED, training goes on (step 20 is safe) and the next save tries again: {failure}" in caplog.text
    fail(False)
    save(saver, 80)
    assert saver.failure is None and saver.must_stop is None
    assert folder.steps() == [80, 20]
    assert heard.metric("failed")[-1] == (80, 2)
    assert heard.notes[-1] == f"mended: step 80 is saved; before it: {failure}"


def test_a_training_of_which_nothing_is_saved_stops_at_its_first_failure(folder, heard, save, fail):
    saver = Saver(folder, heard)
    fail(True)
    save(saver, 1)
    assert isinstance(saver.must_stop, SavesFail)
    assert str(saver.must_stop) == (
        f"{folder.path}: step 1 could not be saved (No space left on device); free space there; then start again: "
        "nothing of this training is saved yet, so it stops before there is more to lose"
    )


def test_a_continued_training_has_something_safe(folder, heard, save, fail):
    saver = Saver(folder, heard)
    saver.safe_step = 20
    fail(True)
    save(saver, 40)
    assert saver.must_stop is None


def test_failures_one_after_another_stop_the_training_when_the_params_say_so(folder, heard, save, fail):
    saver = Saver(folder, heard, most_failed=2)
    save(saver, 20)
    for step in (40, 60):
        fail(True)
        save(saver, step)
        fail(False)
        save(saver, step + 1)
    assert saver.must_stop is None
    fail(True)
    save(saver, 80)
    assert saver.must_stop is None
    save(saver, 100)
    assert "step 100 could not be saved (No space left on device); free space there" in str(saver.must_stop)
    assert "; then start again: saves failed one after another: 2 (checkpoints.most_failed_saves: 2); step 61 is safe" in str(saver.must_stop)


@pytest.mark.parametrize(
    "failed, most, safe, stops",
    [(1, 0, 0, True), (1, 0, 5, False), (99, 0, 5, False), (1, 1, 5, True), (2, 3, 5, False), (3, 3, 5, True), (4, 3, 5, True)],
)
def test_when_failing_saves_stop_a_training(failed: int, most: int, safe: int, stops: bool):
    assert (reason_to_stop(failed, most, safe) is not None) == stops


def test_an_error_that_nobody_foresaw_is_told_once_and_does_not_keep_the_next_step_from_being_saved(folder, heard, save, monkeypatch):
    saver = Saver(folder, heard)
    write = folder._write

    def no_memory(name, content):
        raise MemoryError

    monkeypatch.setattr(folder, "_write", no_memory)
    with pytest.raises(MemoryError):
        save(saver, 1)
    monkeypatch.setattr(folder, "_write", write)
    save(saver, 2)
    assert heard.committed == [2]
