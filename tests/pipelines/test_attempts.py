"""What follows from how a training's attempts ended."""

import pytest

from pipelines.attempts import LONGEST_PAUSE, Attempt, End, decide, end_of, table
from vrt.status import TrainingStatus

PAUSE = 20.0


def attempt(code: int, registered: int = 0, step: int = 0, resumed: int = 0, error: str = "", silent: bool = False) -> Attempt:
    status = TrainingStatus("tiny-1", "http://page", 1, 100.0, 24, resumed, 107.5, step, registered, error=error)
    return Attempt(end_of(code), code, 100.0, None if silent else status, "the last words")


@pytest.mark.parametrize(
    "attempts, pause",
    [
        ([attempt(75, 7, 7)], 0.0),
        ([attempt(75, 7, 7), attempt(75, 9, 9)], 0.0),
        # Told to stop again before it could do anything: not in a tight circle.
        ([attempt(75, 7, 7), attempt(75, 7, 7)], 3 * PAUSE),
        ([attempt(-9, 4, 6)], PAUSE),
        ([attempt(-9, 4, 6), attempt(1, 8, 10), attempt(-9, 12, 14), attempt(-9, 16, 18)], PAUSE),
        ([attempt(1, 4, 6), attempt(1, 4, 6)], 3 * PAUSE),
        ([attempt(1, 4, 6), attempt(75, 7, 7), attempt(1, 7, 9)], PAUSE),
        ([attempt(69, silent=True)] * 50, LONGEST_PAUSE),
        ([attempt(1, 4, 6), attempt(1, 4, 6), attempt(69, silent=True)], PAUSE),
    ],
)
def test_it_is_started_again_after(attempts, pause):
    assert decide(attempts, PAUSE).pause == pause


def test_three_crashes_at_one_step_are_given_up_naming_the_step_and_the_error():
    found = decide([attempt(-9, 2, 3), *[attempt(1, 8, 10, error="ValueError: no such clip\nmore")] * 3], PAUSE)
    assert found.pause is None
    assert found.why == (
        "crashed 3 times at step 10 with no step registered in between; step 8 is the newest registered. "
        "The last error: ValueError: no such clip\nthe last words"
    )


def test_crashes_that_say_nothing_are_counted_with_those_before():
    attempts = [attempt(1, 8, 10), attempt(-9, silent=True), attempt(1, 8, 9)]
    assert "crashed 3 times at steps 10, 0, 9 with no step registered in between" in decide(attempts, PAUSE).why


def test_what_was_refused_is_not_tried_again():
    found = decide([attempt(2)], PAUSE)
    assert found.pause is None and found.why == "the training can't be started as it is:\nthe last words"


def test_the_table_tells_how_each_ended_what_it_lost_and_how_soon_it_went_on():
    attempts = [attempt(-9, 8, 11), attempt(75, 14, 14, resumed=8), attempt(1, silent=True), attempt(0, 24, 24, resumed=14)]
    assert attempts[-1].end is End.DONE
    assert table(attempts).splitlines()[2:] == [
        "| 1 | crashed: killed by SIGKILL | 0 | 11 | 8 | 3 |  |",
        "| 2 | preempted | 8 | 14 | 14 | ? | 7.5 s |",
        "| 3 | crashed: exit code 1 |  | 0 | 0 | 0 |  |",
        "| 4 | done | 14 | 24 | 24 | 0 | 7.5 s |",
    ]
