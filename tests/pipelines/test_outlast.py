"""The main process of a container ends with what its command left behind, not before."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def outlast(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipelines.outlast", "sh", "-c", script, "sh", *map(str, arguments)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def test_it_ends_with_the_commands_code_once_all_that_was_left_behind_has_ended(tmp_path: Path):
    # As a trainer whose flow was killed: in a session of its own, and its own child goes on when it has ended.
    script = 'setsid sh -c "(sleep 1; touch $1) & sleep 0.5" & exit 3'
    assert outlast(script, tmp_path / "saved").wait() == 3
    assert (tmp_path / "saved").exists()


def test_what_has_ended_is_gone_for_those_that_still_work(tmp_path: Path):
    # A grandchild whose parent ended; the command looks whether it is still there, as a flow does after the trainer that it told to stop.
    script = 'sh -c "sleep 0.3 & echo \\$! > $1"; sleep 1; kill -0 $(cat $1) 2>/dev/null && exit 5; exit 0'
    assert outlast(script, tmp_path / "pid").wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_the_commands_to_act_on(number: signal.Signals):
    name = number.name.removeprefix("SIG")
    with outlast(f'trap "echo told; exit 4" {name}; echo ready; while true; do sleep 0.1; done') as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert running.stdout.read() == "told\n"
    assert running.returncode == 4


def test_a_killed_command_is_told_from_one_that_ended():
    assert outlast("kill -9 $$").wait() == 137
