"""One trainer per lineage: the newest claim owns it, silence is judged by the observer's clock, and who was overtaken publishes nothing."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from vrt.checkpoint import claims
from vrt.checkpoint import lease as module
from vrt.checkpoint.claims import RunNotes, S3Notes
from vrt.checkpoint.errors import LeaseLost, LockedError, StoreUnavailable
from vrt.checkpoint.lease import Claim, Lease, Notes, is_gone, newest_claim, own_claim
from vrt.checkpoint.registry import MlflowRegistry
from vrt.checkpoint.tracking import Lineage


class Board:
    """Stands for a store that creates exclusively; `down` lets every call fail as in an outage."""

    def __init__(self):
        self.notes: dict[str, str] = {}
        self.down = False
        self._lock = threading.Lock()

    def _ask(self) -> None:
        if self.down:
            raise StoreUnavailable("the store is down")

    def all(self) -> dict[str, str]:
        self._ask()
        return dict(self.notes)

    def create(self, name: str, text: str) -> bool:
        self._ask()
        with self._lock:
            return self.notes.setdefault(name, text) is text

    def write(self, name: str, text: str) -> None:
        self._ask()
        self.notes[name] = text

    def remove(self, name: str) -> None:
        self._ask()
        self.notes.pop(name, None)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(module, "SECONDS_UNTIL_DEAD", 1.0)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.02)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def take(lineage) -> Iterator[Callable[[Notes], Lease]]:
    taken = []

    def one(notes: Notes) -> Lease:
        lease = Lease(notes, lineage)
        assert lease.take()
        taken.append(lease)
        return lease

    yield one
    for lease in taken:
        lease.release()


def elsewhere(token: int, **changes) -> Claim:
    return replace(own_claim(token), host="gpu-7", place="another machine", pid=4321, **changes)


def enter(notes: Notes, claim: Claim) -> None:
    notes.write(claim.name, json.dumps(asdict(claim)))


def test_who_lets_go_is_followed_at_once_under_a_larger_token(board, take):
    first = take(board)
    first.release()
    second = take(board)
    assert (first.token, second.token) == (1, 2)
    # The claims before the newest are cleared away.
    assert list(board.notes) == ["00000002"]


def test_a_living_trainer_elsewhere_keeps_its_lineage(board, lineage, quick):
    claim = elsewhere(3)
    enter(board, claim)
    ended = threading.Event()

    def beat():
        beats = 0
        while not ended.wait(0.1):
            beats += 1
            enter(board, replace(claim, beats=beats))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        told = (
            rf"{lineage}: process 4321 on gpu-7 trains it since {claim.since}, last heard of at {claim.heard} \(by its own clock\); one trainer at "
            "a time: stop that one, which saves and lets go, or wait for its end, or train under another `name` in the params file"
        )
        with pytest.raises(LockedError, match=told.replace("+", r"\+")):
            Lease(board, lineage).take()
    finally:
        ended.set()
        thread.join()
    assert list(board.notes) == ["00000003"]


def test_a_trainer_elsewhere_that_is_silent_is_taken_for_dead_whatever_its_clock_says(board, take, caplog):
    # Its clock is a year ahead: times of two machines are never compared.
    enter(board, replace(elsewhere(3), heard="2999-01-01T00:00:00+00:00"))
    started = time.monotonic()
    assert take(board).token == 4
    assert time.monotonic() - started >= 1.0
    assert "watching for 1 s whether process 4321 on gpu-7 still trains it" in caplog.text
    assert "process 4321 on gpu-7 is gone without letting go" in caplog.text


def test_who_waits_for_a_silent_trainer_can_be_told_to_stop(board, lineage):
    enter(board, elsewhere(3))
    assert not Lease(board, lineage).take(give_up=lambda: True)
    assert list(board.notes) == ["00000003"]


def test_a_killed_trainer_of_this_machine_is_not_waited_for_and_a_living_one_is_believed(board, lineage, take, child):
    living = child("import sys; sys.stdin.read()")
    enter(board, replace(own_claim(1), pid=living.pid, born=module._born(living.pid)))
    started = time.monotonic()
    with pytest.raises(LockedError, match=f"process {living.pid} on "):
        Lease(board, lineage).take()
    living.kill()
    living.wait()
    assert take(board).token == 2
    assert time.monotonic() - started < 1.0


def test_a_claim_whose_answer_was_lost_and_which_was_sent_again_is_ones_own(board, take, monkeypatch):
    create = board.create
    monkeypatch.setattr(board, "create", lambda name, text: create(name, text) and create(name, f"{text} "))
    assert take(board).token == 1


def test_a_clock_that_is_set_makes_nobody_look_dead(monkeypatch):
    claim, created = own_claim(1), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 3)
    assert is_gone(claim, claim.place, module._born) is False


def test_letting_go_does_not_wait_for_a_store_that_is_silent(board, lineage, monkeypatch, caplog):
    monkeypatch.setattr(module, "SECONDS_TO_LET_GO", 0.3)
    lease, silent = Lease(board, lineage), threading.Event()
    assert lease.take()
    monkeypatch.setattr(board, "all", lambda: silent.wait(60))
    lease.release()
    silent.set()
    assert "could not let go of the lineage (no answer within 0 s); a trainer on another machine has to wait 1 s" in caplog.text


# Born at a fixed time: the ids of tests must be the same in every process.
HERE = replace(own_claim(1), born=1000.0)


@pytest.mark.parametrize(
    "claim, born, gone",
    [
        (HERE, HERE.born, False),
        (HERE, None, True),
        # The pid is in use again, by another process.
        (HERE, HERE.born + 100, True),
        # By a version that kept the time of day.
        (replace(HERE, born=1.7e9), HERE.born, None),
        (replace(HERE, born=1.7e9), None, True),
        (replace(HERE, released=True), HERE.born, True),
        (replace(HERE, place="another machine"), None, None),
        (replace(HERE, place="another machine", released=True), None, True),
    ],
)
def test_when_an_owner_is_known_to_be_gone(claim: Claim, born: float | None, gone: bool | None):
    assert is_gone(claim, HERE.place, lambda pid: born) is gone


def test_a_trainer_that_was_thought_dead_finds_out_and_publishes_nothing(board, take, lineage):
    first = take(board)
    successor = elsewhere(2)
    enter(board, successor)
    told = rf"{lineage}: process 4321 on gpu-7 has taken over at .* \(token 2, here 1\), .* this one stops and publishes nothing more"
    with pytest.raises(LeaseLost, match=told):
        first.validate()
    first.release()
    assert newest_claim(board) == successor, "the successor's claim is as it was"


def test_a_heartbeat_finds_out_too(board, take):
    first = take(board)
    enter(board, elsewhere(2))
    ends = time.monotonic() + 30
    while first.lost is None:
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_of_two_that_wrote_the_same_claim_the_overwritten_one_finds_out(board, take):
    # As a store without exclusive creation allows.
    first = take(board)
    enter(board, elsewhere(first.token))
    with pytest.raises(LeaseLost, match="process 4321 on gpu-7"):
        first.validate()


def test_who_is_overwritten_in_the_very_moment_of_claiming_looks_again(board, take, monkeypatch):
    create = board.create

    def create_and_be_overwritten(name: str, text: str) -> bool:
        monkeypatch.setattr(board, "create", create)
        created = create(name, text)
        enter(board, elsewhere(1))
        return created

    monkeypatch.setattr(board, "create", create_and_be_overwritten)
    # The other is silent, so it is followed; it was not taken for this trainer's own claim.
    assert take(board).token == 2


def test_an_outage_neither_loses_the_lineage_nor_lets_anything_be_published(board, take, caplog):
    first = take(board)
    board.down = True
    with pytest.raises(StoreUnavailable):
        first.validate()
    ends = time.monotonic() + 30
    while "no heartbeat for the lease: the store is down" not in caplog.text:
        assert time.monotonic() < ends
        time.sleep(0.02)
    # A board that was cleared meanwhile costs nothing either.
    board.notes.clear()
    board.down = False
    first.validate()
    while newest_claim(board) is None:
        assert time.monotonic() < ends
        time.sleep(0.02)
    assert first.lost is None


def test_letting_go_during_an_outage_only_warns(board, take, caplog):
    first = take(board)
    board.down = True
    first.release()
    assert "could not let go of the lineage (the store is down); a trainer on another machine has to wait 1 s" in caplog.text


def test_a_note_that_is_no_claim_locks_nobody_out(board, take):
    board.notes |= {"00000009": "{", "notes": "someone's", "00000008": json.dumps(asdict(own_claim(7)))}
    # Nor does it take the name that the next claim would have.
    assert take(board).token == 10


@pytest.mark.parametrize("number", range(5))
def test_of_many_that_start_at_once_one_trains(board, lineage, number: int):
    leases, refused, gate = [], [], threading.Barrier(6)

    def start():
        lease = Lease(board, lineage)
        gate.wait()
        try:
            lease.take()
            leases.append(lease)
        except LockedError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(leases), len(refused)) == (1, 5)
    leases[0].validate()
    leases[0].release()


@pytest.fixture
def in_store(services, tmp_path: Path) -> S3Notes:
    return S3Notes(f"s3://mlflow/lease-{os.getpid()}/{tmp_path.name}")


@pytest.fixture
def on_run(services, tmp_path: Path, monkeypatch) -> RunNotes:
    monkeypatch.setattr(claims, "SECONDS_TO_SETTLE", 0.1)
    registry = MlflowRegistry(Lineage(f"{tmp_path.name}-{os.getpid()}", "0123456789abcdef", {"seed": 1}))
    registry.find_or_create({"seed": 1})
    return RunNotes(registry)


@pytest.mark.parametrize("kind", ["in_store", "on_run"])
def test_claims_are_kept_by_the_real_servers(kind: str, request, take):
    notes = request.getfixturevalue(kind)
    assert notes.all() == {}
    first = take(notes)
    time.sleep(0.5)
    first.validate()
    assert newest_claim(notes).beats > 0
    enter(notes, elsewhere(first.token + 1))
    with pytest.raises(LeaseLost):
        first.validate()
    assert take(notes).token == first.token + 2
    assert set(notes.all()) == {"00000003"}


def test_a_store_that_ignores_the_condition_is_found_out(in_store):
    # rclone takes `If-None-Match: *` and overwrites all the same.
    assert not in_store.are_exclusive()
    assert in_store.all() == {}


def test_where_claims_are_kept_is_decided_once_for_a_lineage(on_run):
    registry = on_run._registry
    assert registry.lease_kind(lambda: "registry") == "registry"
    assert registry.lease_kind(lambda: pytest.fail("asked again")) == "registry"
