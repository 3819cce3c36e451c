"""One trainer per folder: shown with real processes, because only the kernel's word counts here."""

import json
import os
import signal

import pytest

from vrt.checkpoint.errors import LockedError
from vrt.checkpoint.lock import locked

# Takes the lock, says so, and holds it until its standard input ends.
HOLD = """
import os, sys
from pathlib import Path
from vrt.checkpoint.lock import locked
from vrt.observe import set_up_logging

set_up_logging()
with locked(Path(sys.argv[1])):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""
# Starts another script as its own child, as a shell, DVC or a flow does, and waits for it.
LAUNCH = """
import subprocess, sys
subprocess.run([sys.executable, "-u", *sys.argv[1:]])
"""


def test_a_second_process_is_refused_and_told_who_is_first(tmp_path, child):
    first = child(HOLD, tmp_path)
    assert int(first.stdout.readline()) == first.pid
    with (
        pytest.raises(
            LockedError, match=rf"{tmp_path}: process {first.pid} has been training here since 20..-.*; one trainer at a time: wait for it"
        ),
        locked(tmp_path),
    ):
        pytest.fail("two trainers in one folder")
    # It was not disturbed, and when it ends the folder is free.
    first.stdin.close()
    assert first.wait() == 0
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, child):
    first = child(HOLD, tmp_path)
    assert first.stdout.readline()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_is_free_again_after_an_error_inside(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_an_owner_whose_launcher_died_is_waited_for(tmp_path, child):
    launcher = child(LAUNCH, "-c", HOLD, tmp_path, start_new_session=True)
    owner = int(launcher.stdout.readline())
    # While the launcher lives, its trainer is refused to others like any.
    refused = child(HOLD, tmp_path)
    _, told = refused.communicate()
    assert f"LockedError: {tmp_path}: process {owner} has been training here" in told

    # DVC killed by -9: the trainer it launched goes on for a while, and the next `dvc repro` starts a second one.
    os.kill(launcher.pid, signal.SIGKILL)
    second = child(HOLD, tmp_path)
    assert f"{tmp_path}: process {owner} lost its launcher and is saving; waiting for it to end" in second.stderr.readline()
    launcher.stdin.close()
    assert int(second.stdout.readline()) == second.pid


# What is read while the owner is about to write its name.
@pytest.mark.parametrize("content", ["", '{"pid": 12'])
def test_a_lock_that_does_not_tell_its_owner_still_holds(tmp_path, child, content, monkeypatch):
    monkeypatch.setattr("vrt.checkpoint.lock.SECONDS_FOR_AN_ORPHAN_TO_END", 0.0)
    first = child(HOLD, tmp_path)
    assert first.stdout.readline()
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(LockedError, match="has been training here since"), locked(tmp_path):
        pytest.fail("two trainers in one folder")
