"""What is kept, as tables; and that deleting, cut off anywhere, leaves nothing registered without its bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.resume import Candidate, Registered
from vrt.checkpoint.retention import delete, prune, retain
from vrt.params import Checkpoints


def policy(last: int = 1, every: int = 0, best: int = 0) -> Checkpoints:
    return Checkpoints(resume="auto", keep_last=last, keep_every=every, keep_best=best, most_failed_saves=0)


def at(*steps: int, **facts) -> list[Registered]:
    return [Registered(step, f"digest of {step}", f"s3://bucket/{step}", **facts) for step in steps]


SCORED = [*at(10, psnr=30.0), *at(20, psnr=32.0), *at(30, psnr=31.0), *at(40, psnr=29.0)]


@pytest.mark.parametrize(
    "registered, rule, damaged, kept",
    [
        ([], policy(), (), {}),
        (at(10), policy(), (), {10: "the last"}),
        (at(10, 30, 20), policy(last=2), (), {30: "one of the last 2", 20: "one of the last 2"}),
        (at(10, 20), policy(last=9), (), {20: "one of the last 9", 10: "one of the last 9"}),
        (at(10, 20, 30, 40, 50), policy(every=20), (), {50: "the last", 40: "every 20 steps", 20: "every 20 steps"}),
        (SCORED, policy(best=1), (), {40: "the last", 20: "one of the best"}),
        (SCORED, policy(best=2), (), {40: "the last", 30: "one of the best", 20: "one of the best"}),
        # Saved without a validation, 15 carries the score that was measured at 10.
        ([*at(10, 15, psnr=30.0), *at(20, psnr=1.0)], policy(best=1), (), {20: "the last", 10: "one of the best"}),
        # Without a score nothing is among the best, and does not take the place of what is.
        ([*at(10, psnr=-3.0), *at(20), *at(30)], policy(best=1), (), {30: "the last", 10: "one of the best"}),
        ([*at(10, pinned=True), *at(20, held=True), *at(30), *at(40)], policy(), (), {40: "the last", 20: "being downloaded", 10: "pinned"}),
        ([*at(10, champion=True), *at(20)], policy(), (), {20: "the last", 10: "the champion"}),
        # The newest is worth nothing: the newest healthy one is what a training can go on from.
        (at(10, 20, 30), policy(), {30}, {30: "damaged: repair it first", 20: "the last"}),
        (
            [*at(10, psnr=30.0), *at(20, psnr=40.0), *at(30)],
            policy(best=1),
            {20},
            {30: "the last", 20: "damaged: repair it first", 10: "one of the best"},
        ),
    ],
)
def test_what_is_kept_and_why(registered, rule, damaged, kept):
    verdicts = retain(registered, rule, damaged)
    assert [verdict.step for verdict in verdicts] == sorted((one.step for one in registered), reverse=True)
    assert {verdict.step: verdict.reason for verdict in verdicts if verdict.keep} == kept
    assert all(verdict.reason == "" for verdict in verdicts if not verdict.keep)


one = st.builds(Registered, st.integers(1, 40), st.just("d"), st.just("a"), st.none() | st.floats(0, 50), st.booleans(), st.booleans())


def test_what_a_training_that_went_back_registers_stays_below_newer_steps():
    assert [verdict.step for verdict in retain(at(4, 8, 20), policy(), in_use={4}) if verdict.keep] == [20, 4]


@given(st.lists(one, unique_by=lambda one: one.step), st.integers(1, 5), st.integers(0, 7), st.integers(0, 3), st.sets(st.integers(1, 40)))
def test_the_newest_healthy_what_is_pinned_and_what_is_downloaded_always_stay(registered, last, every, best, damaged):
    kept = {verdict.step for verdict in retain(registered, policy(last, every, best), damaged) if verdict.keep}
    healthy = [one.step for one in registered if one.step not in damaged]
    assert not healthy or max(healthy) in kept
    assert {one.step for one in registered if one.pinned or one.held} <= kept
    assert len(kept) >= min(last, len(registered))


class Killed(BaseException):
    pass


class World:
    """Registry and store as sets of what they hold, which die at the call number `dies`; a real folder."""

    def __init__(self, folder: CheckpointFolder, dies: int = 10**9):
        self.folder, self._left = folder, dies
        self.versions = {one.step: one for one in at(*folder.steps())}
        self.objects = {f"s3://bucket/{step}": {"manifest", "files"} for step in folder.steps()}

    def live(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Killed

    def registered(self):
        return dict(self.versions)

    def unregister(self, step: int) -> None:
        self.live()
        del self.versions[step]

    def delete(self, address: str) -> None:
        for name in ("manifest", "files"):
            self.live()
            self.objects.get(address, set()).discard(name)

    def sweep(self, older_than, registered) -> list[int]:
        return []

    def is_sound(self, lineage: str) -> bool:
        """Everything registered has all its bytes, on both sides."""
        local = all(self.folder.problems(step, lineage) == [] for step in self.versions)
        return local and all(self.objects[one.address] == {"manifest", "files"} for one in self.versions.values())


def test_cut_off_after_any_deletion_nothing_is_registered_without_its_bytes(folder, commit, lineage, monkeypatch):
    unlink = type(folder.path).unlink
    died = 0
    for dies in range(100):
        for step in (10, 20, 30):
            commit(folder, step)
        world = World(folder, dies)
        with monkeypatch.context() as counted:
            counted.setattr(type(folder.path), "unlink", lambda path, missing_ok=False, world=world: (world.live(), unlink(path, missing_ok)))
            try:
                prune(folder, world, world, policy())
            except Killed:
                died += 1
            else:
                break
        assert world.is_sound(lineage), dies
        # A copy that lost files has lost its manifest before: nobody takes it for a checkpoint.
        assert all(folder.problems(step, lineage) == [] for step in folder.steps()), dies
        assert all("manifest" not in names or "files" in names for names in world.objects.values()), dies
        # The next attempt registers the whole copies that are left, and its first registration finishes the work.
        again = World(folder)
        prune(folder, again, again, policy())
        assert (folder.steps(), list(again.versions)) == ([30], [30])
        for rest in folder.path.glob("[12]0_*"):
            rest.unlink()
    # Two checkpoints of a version, a manifest and its objects, and three local files each.
    assert died == 2 * (1 + 2 + 3)


def test_what_is_not_registered_is_deleted_only_by_name(folder, commit):
    for step in (10, 20, 30):
        commit(folder, step)
    world = World(folder)
    del world.versions[10]
    assert prune(folder, world, world, policy()) == [20]
    assert folder.steps() == [30, 10]
    delete(Candidate(10, True, None, "s3://bucket/10"), folder, world, world)
    assert (folder.steps(), world.objects["s3://bucket/10"]) == ([30], set())
