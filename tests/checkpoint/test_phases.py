"""The points at which a drill kills a training: nothing happens there unless it was armed."""

import signal

import pytest

from vrt.checkpoint.phases import KILL_AT, Phase, reached

REACH = """
import sys, time
from vrt.checkpoint.phases import Phase, reached
for phase in sys.argv[1:]:
    reached(Phase(phase))
    print(phase, flush=True)
time.sleep(60 if sys.argv[1] == "snapshot" else 0)
"""


@pytest.mark.parametrize(
    "armed, code, passed",
    [
        ("", 0, ["step", "upload", "step", "upload", "step"]),
        ("upload:1", -signal.SIGKILL, ["step"]),
        ("upload:2", -signal.SIGKILL, ["step", "upload", "step"]),
        ("upload:3", 0, ["step", "upload", "step", "upload", "step"]),
    ],
)
def test_only_the_process_armed_for_it_is_killed_at_the_count_given(child, monkeypatch, armed, code, passed):
    monkeypatch.setenv(KILL_AT, armed)
    process = child(REACH, "step", "upload", "step", "upload", "step")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.split()) == (code, passed)


def test_a_process_armed_with_seconds_is_killed_that_long_after_the_first_phase(child, monkeypatch):
    monkeypatch.setenv(KILL_AT, "seconds:0.2")
    process = child(REACH, "snapshot")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.split()) == (-signal.SIGKILL, ["snapshot"])


@pytest.mark.parametrize("armed", ["uplaod:1", "upload", "upload:soon", "seconds:", "5"])
def test_a_slip_in_the_variable_is_named_with_what_is_allowed(monkeypatch, armed):
    monkeypatch.setenv(KILL_AT, armed)
    with pytest.raises(ValueError, match=f"VRT_KILL_AT={armed}: expected PHASE:COUNT or seconds:NUMBER.* step, snapshot, .*unset it to train"):
        reached(Phase.STEP)
