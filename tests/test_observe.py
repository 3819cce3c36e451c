"""What a person reads of a running command where there is no terminal: plain lines, not too many."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vrt.observe import without_credentials

PROJECT = Path(__file__).resolve().parents[1]

# Works through 100 units of a second each; the clock is the script's own.
WORK = """
import sys
from vrt import observe

class Clock:
    now = 1000.0
    @classmethod
    def monotonic(cls):
        return cls.now

observe.time = Clock
observe.set_up_logging()
observe.set_up_logging()
first, total = int(sys.argv[1]), int(sys.argv[2])
with observe.progress("train", total, "steps", done=first) as bar:
    for step in range(first + 1, total + 1):
        Clock.now += 1.0
        bar.advance(1, loss=f"{1 / step:.2f}")
observe.log.warning("a %s that ends", "line")
"""


def lines(first: int, total: int) -> list[str]:
    child = subprocess.run([sys.executable, "-c", WORK, str(first), str(total)], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert child.stdout == ""
    return child.stderr.splitlines()


@pytest.fixture(scope="module")
def long() -> list[str]:
    return lines(40, 100)


def test_lines_are_plain_and_say_when_and_how_grave(long):
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d (INFO   |WARNING) [ -~]+", line) for line in long), long
    assert long[-1].endswith("WARNING a line that ends")


def test_progress_is_told_every_five_seconds_with_what_is_left(long):
    told = [line.split("INFO    ")[1] for line in long[:-1]]
    assert [int(re.match(r"train (\d+)/100 steps", line)[1]) for line in told] == list(range(45, 101, 5))
    assert told[0] == "train 45/100 steps  loss 0.02  left 0:00:55"
    assert told[-1] == "train 100/100 steps  loss 0.01"


def test_the_end_of_a_long_task_is_told_whenever_it_comes():
    assert [line.split("INFO    ")[1] for line in lines(0, 7)[:-1]] == ["train 5/7 steps  loss 0.20  left 0:00:02", "train 7/7 steps  loss 0.14"]


def test_a_short_task_is_silent():
    assert lines(0, 4)[:-1] == []


@pytest.mark.parametrize(
    "address, kept",
    [
        ("https://user:secret@host.org/team/vrt.git", "https://host.org/team/vrt.git"),
        ("https://token@host.org:8443/vrt.git", "https://host.org:8443/vrt.git"),
        ("https://host.org/vrt.git", "https://host.org/vrt.git"),
        ("git@host.org:team/vrt.git", "git@host.org:team/vrt.git"),
        ("/srv/vrt.git", "/srv/vrt.git"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_what_opens_it(address, kept):
    assert without_credentials(address) == kept
