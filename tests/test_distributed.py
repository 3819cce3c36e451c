"""Real processes, started by torchrun, that talk by gloo."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from vrt import distributed, lifecycle
from vrt.distributed import PeerLost, Torchrun

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def torchrun(tmp_path: Path):
    """Starts `script` in several processes; each finds `team` in it."""

    def start(script: str, processes: int, device: str = "cpu") -> subprocess.Popen:
        path = tmp_path / "script.py"
        path.write_text(
            f"import torch, time\nfrom vrt.distributed import PeerLost, joined\nwith joined(torch.device('{device}')) as team:\n    {script}\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(path)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def test_all_add_up_hear_the_leader_and_agree(torchrun):
    script = """a, b = torch.full((2, 2), float(team.rank + 1)), torch.tensor(1.0)
    team.add_up([a, b])
    told = team.from_leader({"weights": torch.arange(3), "step": 7} if team.leads else None)
    late, nobody = team.any(team.rank == 2), team.any(False)
    late = (late, team.total(0.5, team.rank))
    print(f"{team.rank}: {a.tolist()} {b.item()} {told['weights'].tolist()} {told['step']} {late} {nobody}", flush=True)"""
    output, _ = torchrun(script, 3).communicate(timeout=120)
    for rank in range(3):
        assert f"{rank}: [[6.0, 6.0], [6.0, 6.0]] 3.0 [0, 1, 2] 7 (True, (1.5, 3.0)) False" in output, output


def test_gradients_are_added_up_on_the_gpu_and_all_else_beside_it(torchrun, gpu):
    # One process: NCCL gives each a GPU of its own.
    script = """team.connect(torch.device("cuda", 0))
    a = torch.full((2, 2), 3.0, device="cuda")
    team.add_up([a])
    told = team.from_leader({"weights": torch.arange(3, device="cuda")})
    print(a.tolist(), told["weights"].tolist(), team.any(True), team.total(0.5), flush=True)"""
    output, _ = torchrun(script, 1, "cuda").communicate(timeout=120)
    assert "[[3.0, 3.0], [3.0, 3.0]] [0, 1, 2] True (0.5,)" in output, output


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, which is on the CPU."""

    is_cuda = True


class Pulse:
    """A heart whose others are there for so many checks."""

    def __init__(self, checks: int):
        self.checks = checks

    def check(self) -> None:
        self.checks -= 1
        if self.checks < 0:
            raise PeerLost("rank 1 has said nothing")


class Done:
    """An exchange that is over."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None: ...


def test_a_sum_on_gpus_begins_once_all_are_seen_to_be_there(monkeypatch):
    # NCCL does not notice within a machine that another process died; gloo does at once.
    exchanged = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: exchanged.append("backward pass"))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor, async_op: exchanged.append(tensor.is_cuda) or Done())
    team = Torchrun(0, 2, Pulse(1000))
    team.add_up([torch.ones(3).as_subclass(OnGpu)])
    assert exchanged == ["backward pass", False, True]
    exchanged.clear()
    team.add_up([torch.ones(3)])
    assert exchanged == [False], "which closes its connections at once itself"


@pytest.fixture
def connecting(monkeypatch):
    """A process whose first sum on its GPU is what the test says; the others are there for two checks of the heart."""

    def started(first_sum) -> Torchrun:
        monkeypatch.setattr(distributed, "first_sum", first_sum)
        monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor, async_op: Done())
        monkeypatch.setattr(lifecycle, "_abandoned", [])
        return Torchrun(0, 2, Pulse(2))

    return started


def test_the_first_sum_on_gpus_is_over_before_anything_is_computed(connecting):
    summed = []
    team = connecting(summed.append)
    team.connect(torch.device("cpu"))
    assert summed == [], "gloo is connected from the start"
    team.connect(torch.device("cuda", 1))
    assert summed == [torch.device("cuda", 1)] and not team.lost


def test_who_dies_while_gpus_connect_is_noticed_and_does_not_keep_the_others_from_ending(connecting):
    over = threading.Event()
    team = connecting(lambda device: over.wait(60))
    with pytest.raises(PeerLost, match="rank 1 has said nothing"):
        team.connect(torch.device("cuda", 0))
    assert team.lost and [thread.is_alive() for thread in lifecycle._abandoned] == [True]
    over.set()


def test_gpus_that_can_not_connect_are_told_with_where_to_look(connecting, monkeypatch):
    monkeypatch.setattr(distributed, "SECONDS_TO_CONNECT", 0.3)
    over = threading.Event()
    message = (
        r"^rank 0 of 2 on \S+: NCCL has not connected its GPU with those of the others within 0 s; NCCL_DEBUG=INFO tells by which way it tries, "
        "NCCL_SOCKET_IFNAME names the network interface to take, and no firewall may be between them$"
    )
    with pytest.raises(RuntimeError, match=message):
        connecting(lambda device: over.wait(60)).connect(torch.device("cuda", 0))
    over.set()

    def refused(device):
        raise RuntimeError("NCCL error: Duplicate GPU detected\nand more")

    with pytest.raises(PeerLost, match=r"lost the others \(NCCL error: Duplicate GPU detected\)"):
        connecting(refused).connect(torch.device("cuda", 0))


def test_two_gpus_add_up_what_each_has(torchrun, two_gpus):
    script = """from vrt.distributed import device_here
    team.connect(device_here())
    a = torch.full((2, 2), float(team.rank + 1), device=device_here())
    team.add_up([a])
    told = team.from_leader({"weights": torch.arange(3, device=a.device)} if team.leads else None)
    print(f"{team.rank}: {a.device} {a.tolist()} {told['weights'].tolist()}", flush=True)"""
    output, _ = torchrun(script, 2, "cuda").communicate(timeout=120)
    for rank in range(2):
        assert f"{rank}: cuda:{rank} [[3.0, 3.0], [3.0, 3.0]] [0, 1, 2]" in output, output


def test_processes_that_differ_are_told_which_and_how(torchrun):
    script = 'team.check_same({"data": "abc", "params": f"p{team.rank // 2}"})'
    output, _ = torchrun(script, 3).communicate(timeout=120)
    assert "the 3 processes of this training differ, but all must be started alike:" in output, output
    assert "params: rank 0 p0, rank 1 p0, rank 2 p1" in output, output
    assert "data:" not in output


def test_what_the_leader_fails_with_reaches_those_that_lose_it(torchrun):
    script = """if team.leads:
        team.leave_word(69)
    else:
        try:
            team.any(False)
        except PeerLost:
            print(f"{team.rank} heard {team.word_of_leader()}", flush=True)"""
    output, _ = torchrun(script, 3).communicate(timeout=120)
    assert "1 heard 69" in output and "2 heard 69" in output, output


def test_only_where_all_ended_well_is_their_group_ended_with_them(torchrun):
    # To end NCCL's waits for all others, which may be gone, or wait themselves in a sum that this process will never join.
    told = """torch.distributed.destroy_process_group = lambda: print(f"{team.rank} ended the group", flush=True)
    """
    well, _ = torchrun(told + "team.any(False)", 2).communicate(timeout=120)
    assert "0 ended the group" in well and "1 ended the group" in well, well

    script = """__import__('signal').signal(15, 1)  # torchrun ends the others of one that failed
    if team.rank == 1:
        raise ValueError("rank 1 has had enough")
    try:
        team.any(False)
    except PeerLost:
        print("0 lost it and ends well", flush=True)"""
    badly, _ = torchrun(told + script, 2).communicate(timeout=120)
    assert "rank 1 has had enough" in badly and "0 lost it and ends well" in badly, badly
    assert "ended the group" not in badly, badly


@pytest.mark.long
def test_a_silent_meeting_point_is_taken_for_dead(torchrun):
    # The agent that keeps the store, stopped: it answers nothing and closes nothing, as a host that lost its power.
    script = """print("begins", flush=True)
    try:
        while True:
            if team.leads: time.sleep(1000)
            team.any(False)
    except PeerLost as error:
        print(error, flush=True)
        __import__('os')._exit(1)"""
    run = torchrun(script, 2)
    while "begins" not in run.stdout.readline():
        pass
    time.sleep(5)
    everything = [*psutil.Process(run.pid).children(), psutil.Process(run.pid)]
    run.send_signal(signal.SIGSTOP)
    late = threading.Timer(90, lambda: [process.kill() for process in everything])
    late.start()
    text = ""
    for line in run.stdout:
        text += line
        if "has said nothing" in line:
            break
    late.cancel()
    for process in everything:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run.communicate(timeout=60)
    assert "the host that torchrun's processes meet at has said nothing for 20 s: it or the network to it is gone" in text, text


@pytest.mark.long
def test_a_silent_process_is_taken_for_dead(torchrun):
    # Stopped, it closes no connection, as on a host that lost its power.
    script = """print(f"rank {team.rank} is {__import__('os').getpid()}", flush=True)
    try:
        while True:
            team.any(False); time.sleep(0.05)
    except PeerLost as error:
        print(error, flush=True)
        __import__('os')._exit(1)"""
    run = torchrun(script, 2)
    pids: dict[str, str] = {}
    while len(pids) < 2:
        if found := re.match(r"rank (\d) is (\d+)", run.stdout.readline()):
            pids[found[1]] = found[2]
    time.sleep(5)
    os.kill(int(pids["1"]), signal.SIGSTOP)
    first = psutil.Process(int(pids["0"]))
    # Ended, and perhaps not asked for its exit code yet.
    for _ in range(600):
        if not first.is_running() or first.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    os.kill(int(pids["1"]), signal.SIGKILL)
    text, _ = run.communicate(timeout=60)
    assert "rank 1 has said nothing for 20 s: its host or the network to it is gone" in text, text
