"""When a command is told to stop, or left alone: shown with real signals and real chains of processes."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vrt.lifecycle import OUTCOME, SECONDS_TO_WIND_UP, StopRequest, ToldToStop, within

PROJECT = Path(__file__).resolve().parents[1]

# A trainer that says who it is, then why it was told to stop; or ends with its input, when nobody told it.
TRAINER = """
import os, select, sys, time
from vrt.lifecycle import StopRequest, launchers_of

with StopRequest() as stop:
    print(os.getpid(), len(launchers_of(os.getpid())), flush=True)
    while stop.reason is None:
        if select.select([sys.stdin], [], [], 0.05)[0]:
            break
    print(stop.reason, flush=True)
"""
# Starts another script as a child and waits for it, as a shell, DVC, torchrun or a flow does.
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-u", *sys.argv[1:]])
print(child.pid, flush=True)
child.wait()
"""
AS_IN_A_TERMINAL = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts scripts, each launched by the one before, in a session of their own; ends what is left of them."""
    started: list[subprocess.Popen[str]] = []

    def launch(*scripts: str, hang_up: str = AS_IN_A_TERMINAL) -> subprocess.Popen[str]:
        arguments = [argument for script in scripts for argument in ("-c", hang_up + script)]
        command = [sys.executable, "-u", *arguments]
        process = subprocess.Popen(command, cwd=PROJECT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        return process

    yield launch
    for process in started:
        # The session is gone where the test ended as it should.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_says_which(start, number: signal.Signals):
    trainer = start(TRAINER)
    trainer.stdout.readline()
    trainer.send_signal(number)
    assert trainer.stdout.read() == f"received {number.name}\n"
    assert trainer.wait() == 0


# Has a terminal of its own, starts another script in it below a shell of a kind, and closes it once the script has said its first word.
TERMINAL = """
import os, pty, subprocess, sys, time

shell, terminal = pty.fork()
if shell == 0:
    subprocess.Popen([sys.executable, "-u", *sys.argv[1:]], start_new_session=APART).wait()
    os._exit(0)
shown = b""
while b"begun" not in shown:
    shown += os.read(terminal, 100)
os.close(terminal)
for _ in range(1000):
    if os.path.exists(DONE):
        print(open(DONE).read(), flush=True)
        break
    time.sleep(0.05)
"""
# A trainer with a progress bar that writes all the while, and to a file what it was told, after it has written to its terminal.
WATCHED = """
import time
from pathlib import Path
from vrt.lifecycle import StopRequest
from vrt.observe import log, progress, set_up_logging

set_up_logging()
with StopRequest() as stop, progress("train", 1000, "steps") as bar:
    print("begun", flush=True)
    while stop.reason is None:
        time.sleep(0.05)
        bar.advance()
    for _ in range(10):
        time.sleep(0.1)
        print("saving", flush=True)
        log.warning("saving")
        bar.advance()
done = Path(DONE)
done.with_suffix(".new").write_text(stop.reason)
done.with_suffix(".new").rename(done)
"""


@pytest.mark.parametrize("apart, reason", [(False, "received SIGHUP"), (True, "process [0-9]+, which launched this one, is gone")])
def test_who_trains_in_a_terminal_that_is_closed_saves(start, tmp_path: Path, apart: bool, reason: str):
    # Apart: in a session of its own, as torchrun's processes are.
    given = f"DONE, APART = {str(tmp_path / 'done')!r}, {apart}\n"
    assert re.fullmatch(reason, start(given + TERMINAL, given + WATCHED).stdout.readline().strip())


# Starts another script as torchrun's processes are started, and asks it to stop before it can have begun to listen.
EAGER = """
import signal, subprocess, sys
from vrt.lifecycle import held_back

with held_back(signal.SIGUSR1):
    child = subprocess.Popen([sys.executable, "-u", *sys.argv[1:]])
child.send_signal(signal.SIGUSR1)
print(child.wait(), flush=True)
"""


def test_a_signal_that_comes_before_anybody_listens_is_heard(start):
    trainer = start(EAGER, TRAINER)
    # Without the signal, it ends with its input.
    trainer.stdin.close()
    trainer.stdout.readline()
    assert trainer.stdout.read() == "received SIGUSR1\n0\n"


# Saves for as long as it is asked whether it still does.
SAVES = """
import sys, time
from vrt.lifecycle import StopRequest

with StopRequest() as stop:
    print("training", flush=True)
    while stop.reason is None:
        time.sleep(0.01)
    try:
        print(stop.reason, flush=True)
        while sys.stdin.readline():
            print("saving", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_interrupts_at_once(start, first: signal.Signals):
    trainer = start(SAVES)
    assert trainer.stdout.readline() == "training\n"
    trainer.send_signal(first)
    assert trainer.stdout.readline() == f"received {first.name}\n"
    # Being told again by whoever sends SIGTERM is no reason to drop the save.
    trainer.send_signal(signal.SIGTERM)
    trainer.stdin.write("still there?\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "saving\n"
    trainer.send_signal(signal.SIGINT)
    assert trainer.stdout.read() == "interrupted\n"


AFTERWARDS = """
import signal
from vrt.lifecycle import StopRequest

before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
with StopRequest():
    pass
print(before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)])
"""


def test_afterwards_signals_mean_what_they_meant_before(start):
    assert start(AFTERWARDS).stdout.read() == "True\n"


# "parent" is the trainer's own, "grandparent" the one above it, as `dvc repro` is above the shell of its stage.
@pytest.mark.parametrize("killed", ["parent", "grandparent"])
def test_the_death_of_a_launcher_is_noticed(start, killed: str):
    chain = start(LAUNCHER, LAUNCHER, TRAINER)
    parent = int(chain.stdout.readline())
    trainer = int(chain.stdout.readline())
    assert chain.stdout.readline().split() == [str(trainer), "2"]
    os.kill({"parent": parent, "grandparent": chain.pid}[killed], signal.SIGKILL)
    gone = {"parent": parent, "grandparent": chain.pid}[killed]
    assert chain.stdout.readline() == f"process {gone}, which launched this one, is gone\n"


def test_torchruns_own_sessions_do_not_hide_the_launcher(start):
    # torchrun gives each worker a session; what launched torchrun counts all the same.
    in_own_session = LAUNCHER.replace("*sys.argv[1:]])", "*sys.argv[1:]], start_new_session=True)")
    chain = start(LAUNCHER, in_own_session, TRAINER)
    chain.stdout.readline()
    trainer = int(chain.stdout.readline())
    try:
        assert chain.stdout.readline().split() == [str(trainer), "2"]
        os.kill(chain.pid, signal.SIGKILL)
        assert chain.stdout.readline() == f"process {chain.pid}, which launched this one, is gone\n"
    finally:
        with suppress(ProcessLookupError):
            os.kill(trainer, signal.SIGKILL)


def test_under_nohup_a_training_outlives_whoever_launched_it(start):
    ignoring = AS_IN_A_TERMINAL.replace("SIG_DFL", "SIG_IGN")
    chain = start(LAUNCHER, TRAINER, hang_up=ignoring)
    trainer = int(chain.stdout.readline())
    assert chain.stdout.readline().split() == [str(trainer), "0"]
    os.kill(chain.pid, signal.SIGKILL)
    chain.wait()
    # It goes on until it is asked to end: by its input, and not by the death that it would notice within half a second.
    assert select.select([chain.stdout], [], [], 1.5)[0] == []
    chain.stdin.close()
    assert chain.stdout.readline() == "None\n"


# A command whose upload hangs in a pool, for which Python would wait at its end.
STUCK = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from vrt.lifecycle import leave, within

def upload():
    with ThreadPoolExecutor() as pool:
        pool.submit(time.sleep, 600).result()

print(within(0.2, upload), within(60, lambda: None))
leave(75)
"""


def test_what_was_abandoned_does_not_keep_a_command_from_ending(start):
    stuck = start(STUCK)
    assert stuck.wait(60) == 75
    assert stuck.stdout.read() == "False True\n"


# As threads of gloo and NCCL that wait for a process that is gone.
WAITING = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"


@pytest.fixture
def started_by_torchrun(monkeypatch) -> None:
    """So do processes look that this test starts; and no `vrt train` started that."""
    monkeypatch.delenv(OUTCOME, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")


@pytest.mark.parametrize("code", [0, 1])
def test_a_process_that_torchrun_started_ends_at_once_whoever_launched_that(start, started_by_torchrun, code: int):
    assert start(f"{WAITING}from vrt.lifecycle import leave\nleave({code})").wait(30) == code


def test_so_does_one_with_an_error_that_nobody_foresaw(start, started_by_torchrun):
    unforeseen = "import sys\nfrom vrt import cli\nsys.stderr = sys.stdout\ncli.main = lambda: {}['nothing']\ncli.program()"
    ended = start(WAITING + unforeseen)
    assert ended.wait(30) == 1
    assert ended.stdout.read().endswith("KeyError: 'nothing'\n")


def test_what_can_be_done_again_is_given_up_only_after_a_while(monkeypatch):
    stop = StopRequest()
    stop.heed()
    stop._ask("received SIGTERM")
    stop.heed()
    asked = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: asked + SECONDS_TO_WIND_UP + 1)
    with pytest.raises(ToldToStop, match="received SIGTERM"):
        stop.heed()


def test_a_process_of_several_whose_launcher_is_gone_ends_as_ever(start, tmp_path, monkeypatch):
    monkeypatch.setenv(OUTCOME, str(tmp_path / "removed" / "outcome"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start("from vrt.lifecycle import leave\nleave(75)").wait(60) == 0


def test_what_a_bounded_call_raises_is_raised():
    with pytest.raises(KeyError):
        within(60, lambda: {}["nothing"])


def test_the_watch_ends_with_the_command(start):
    # A training that is over must not be told to stop: nobody would look.
    script = "import threading\nfrom vrt.lifecycle import StopRequest\nwith StopRequest():\n    pass\n"
    script += "[thread.join() for thread in threading.enumerate() if thread.name == 'launcher watch']\nprint('over')"
    assert start(script).stdout.read() == "over\n"
