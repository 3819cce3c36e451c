"""Several processes train as one: the same training, killed and continued with any number of them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from tests.same_training import assert_same_training, lineage_folder
from vrt.checkpoint.curator import Curator
from vrt.checkpoint.errors import StoreUnavailable
from vrt.data.clips import PreparedData
from vrt.data.prepare import prepare
from vrt.params import load_params, with_resume
from vrt.stages import PREPARED, together
from vrt.stages.lineage import lineage_of
from vrt.stages.together import is_trained, train_together, wait_for_host

BATCH = {"train__batch_size": 4}


@pytest.fixture
def workers_of():
    """The processes that torchrun started for a launcher, by rank."""

    def find(launcher) -> dict[int, psutil.Process]:
        (torchrun,) = psutil.Process(launcher.pid).children()
        return {int(worker.environ()["RANK"]): worker for worker in torchrun.children()}

    return find


@pytest.fixture
def make_for_two(make_workspace):
    """Makes workspaces whose trainers, where the machine has a single GPU, see none: two processes then train on its CPU."""

    def make(name: str):
        workspace = make_workspace(name)
        return seeing_no_gpu(workspace) if torch.cuda.device_count() == 1 else workspace

    return make


def seeing_no_gpu(workspace):
    return replace(workspace, environment=workspace.environment | {"CUDA_VISIBLE_DEVICES": ""})


def went_on_after(log: str) -> int:
    """The step that the attempt continued from."""
    return int(re.search(r"continuing after step (\d+)", log)[1])


def history_of(workspace) -> list[dict[str, float]]:
    return [json.loads(line) for line in (lineage_folder(workspace) / "24_history.jsonl").read_text().splitlines()]


@pytest.fixture
def two_uninterrupted(make_for_two):
    workspace = make_for_two("two")
    workspace.edit(**BATCH)
    ended = workspace.vrt("train", "--processes", "2")
    assert ended.returncode == 0, ended.stdout
    return workspace


@pytest.mark.parametrize("dies", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_dies_ends_the_attempt_and_the_next_ends_bit_identically(dies: int, make_for_two, two_uninterrupted, workers_of):
    workspace = make_for_two("dies")
    workspace.edit(**BATCH)
    trainer = workspace.start("vrt", "train", "--processes", "2")
    workspace.wait_for("checkpoint 4 registered", trainer)
    workers = workers_of(trainer)
    workers[dies].kill()
    killed = time.monotonic()

    assert trainer.wait(60) == 1, workspace.log.read_text()

    print(f"gone after {time.monotonic() - killed:.1f} s")
    assert not any(worker.is_running() for worker in workers.values())
    assert f"rank {1 - dies} of 2 on" in workspace.log.read_text() and "lost the others" in workspace.log.read_text(), workspace.log.read_text()

    ended = workspace.vrt("train", "--processes", "2")

    assert ended.returncode == 0, ended.stdout
    assert went_on_after(ended.stdout) >= 4
    assert_same_training(two_uninterrupted, workspace)


# What torchrun starts on each of two machines, whose folders are the arguments.
ON_ITS_MACHINE = """
import os, sys
os.chdir(sys.argv[1 + int(os.environ["RANK"])])
sys.path.insert(0, os.getcwd())
from vrt.cli import program
sys.argv[1:] = ["train"]
program()
"""


@pytest.fixture
def two_folders(make_for_two, tmp_path):
    """Two workspaces, and what trains in both together: one process in each, as on two machines."""
    first = make_for_two("folders")
    first.edit(**BATCH)
    second = replace(first, root=tmp_path / "second")
    shutil.copytree(first.root, second.root, symlinks=True)
    (tmp_path / "machine.py").write_text(ON_ITS_MACHINE)
    environment = {**first.environment, "GLOO_SOCKET_IFNAME": "lo"}
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "machine.py"), str(first.root), str(second.root)]
    return first, second, lambda: replace(first, environment=environment).run(*command)


def test_the_process_that_leads_saves_alone(two_folders):
    first, second, train = two_folders
    for workspace in (first, second):
        workspace.edit(train__total_steps=4)
    assert train().returncode == 0
    assert (lineage_folder(first) / "4_manifest.json").exists()
    # How the training stands is told beside the folders of checkpoints.
    assert not [*second.root.glob("checkpoints/*/*")]


def test_machines_with_other_params_code_or_data_begin_nothing_and_say_which_differ(two_folders):
    first, second, train = two_folders
    second.edit(optimizer__lr=1e-3)
    with (second.root / "vrt/params.py").open("a") as code:
        code.write("# changed here, and not committed\n")
    described = second.root / "data/raw/tiny/dataset.yaml"
    described.write_text(described.read_text().replace("clips: 2", "clips: 3"))
    prepare(described.parent, second.root / PREPARED)

    ended = train()

    assert ended.returncode != 0 and re.search(r"exitcode *: 2 ", ended.stdout), ended.stdout
    assert "the 2 processes of this training differ, but all must be started alike:" in ended.stdout, ended.stdout
    for differing in ("params", "code", "data"):
        one, other = re.search(rf"{differing}: rank 0 (.+), rank 1 (.+)", ended.stdout).groups()
        assert one != other
    assert "torch: rank 0" not in ended.stdout
    assert not (first.root / "checkpoints").exists() and not (second.root / "checkpoints").exists()


@pytest.mark.long
def test_a_rank_that_dies_after_the_last_step_does_not_undo_it(make_for_two, two_uninterrupted, workers_of):
    workspace = make_for_two("dies-last")
    workspace.edit(**BATCH)
    trainer = workspace.start("vrt", "train", "--processes", "2")
    # What follows for the one that leads is to save, publish and register.
    workspace.wait_for("step 24: validation", trainer)
    workers_of(trainer)[1].kill()

    assert trainer.wait(60) == 0, workspace.log.read_text()

    assert "registered; browse it at" in workspace.log.read_text()
    assert_same_training(two_uninterrupted, workspace)


@pytest.mark.long
def test_preempted_before_its_processes_listen_and_again_in_the_middle_a_training_ends_bit_identically(make_for_two, two_uninterrupted):
    workspace = make_for_two("preempted")
    workspace.edit(**BATCH)
    trainer = workspace.start("vrt", "train", "--processes", "2")
    until(lambda: any("RANK" in environment_of(process) for process in psutil.Process(trainer.pid).children(recursive=True)), [trainer])
    trainer.terminate()
    assert trainer.wait(60) == 75, workspace.log.read_text()
    trainer = workspace.start("vrt", "train", "--processes", "2")
    workspace.wait_for("checkpoint 12 registered", trainer)
    trainer.terminate()
    assert trainer.wait(60) == 75, workspace.log.read_text()
    assert "Traceback" not in workspace.log.read_text(), workspace.log.read_text()

    ended = workspace.vrt("train", "--processes", "2")

    assert ended.returncode == 0, ended.stdout
    assert went_on_after(ended.stdout) >= 12
    assert_same_training(two_uninterrupted, workspace)


@pytest.mark.long
def test_with_any_number_of_processes_it_is_the_same_training(make_for_two, two_uninterrupted, workers_of):
    workspace = make_for_two("elastic")
    if torch.cuda.device_count() < 4:
        workspace = seeing_no_gpu(workspace)
    # One clip after the other, too: the same as all at once.
    workspace.edit(**BATCH, train__clips_at_once=1)
    for processes, until in (("4", "checkpoint 8 registered"), ("2", "checkpoint 16 registered")):
        trainer = workspace.start("vrt", "train", "--processes", processes)
        workspace.wait_for(until, trainer)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert went_on_after(workspace.log.read_text()) >= 8
    ended = workspace.vrt("train")

    assert ended.returncode == 0, ended.stdout
    assert went_on_after(ended.stdout) >= 16
    assert lineage_folder(workspace).name.split("-")[-1] == lineage_folder(two_uninterrupted).name.split("-")[-1]
    losses, others = ([row["train/loss"] for row in history_of(each)] for each in (two_uninterrupted, workspace))
    assert others == pytest.approx(losses, rel=1e-3) and len(losses) == 24
    # Adam makes much of the last bits of a small gradient; the weights moved by up to 24 * 3e-3.
    for name in ("24_G.pth", "24_E.pth"):
        one, other = (torch.load(lineage_folder(each) / name, weights_only=True) for each in (two_uninterrupted, workspace))
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=0, atol=5e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_a_machine_that_comes_first_waits_for_the_one_where_all_meet():
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    meet = f"127.0.0.1:{port}"
    with pytest.raises(StoreUnavailable, match=f"--meet {meet}: nothing answered there for 0 s .*start the same command on the machine that has"):
        wait_for_host(meet, 0, lambda: False)
    assert not wait_for_host(meet, 60, lambda: True)

    opened = threading.Event()

    def open_late() -> None:
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", port)) as late:
            opened.set()
            late.accept()[0].close()

    late = threading.Thread(target=open_late)
    late.start()
    assert wait_for_host(meet, 60, lambda: False)
    assert opened.is_set()
    late.join()


def test_the_machine_where_all_meet_asks_to_be_started_again_where_nobody_comes(make_for_two, services, monkeypatch):
    workspace = make_for_two("alone")
    workspace.edit(**BATCH)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        meet = f"127.0.0.1:{reserved.getsockname()[1]}"
    monkeypatch.chdir(workspace.root)
    monkeypatch.setattr(together, "SECONDS_TO_MEET", 3.0)
    with pytest.raises(StoreUnavailable, match=f"--meet {meet}: not all of the 2 machines met there within 3 s.*start the same command on each"):
        train_together(Path("params.yaml"), None, 1, 2, meet)
    # Preempted meanwhile, it has nothing to save, and does not wait.
    waiting = workspace.start("vrt", "train", "--processes", "1", "--machines", "2", "--meet", meet)
    workspace.wait_for("training with 2 processes on 2 machines", waiting)
    waiting.terminate()
    assert waiting.wait(60) == 75, workspace.log.read_text()


def test_only_what_ended_with_everything_registered_is_not_met_for_again(uninterrupted, services, monkeypatch):
    monkeypatch.chdir(uninterrupted.root)
    params = load_params(Path("params.yaml"))
    registry = Curator(lineage_of(params, PreparedData.open(PREPARED)))

    def trained(policy: str = "auto", steps: int = 24) -> bool:
        train = params.train.model_copy(update={"total_steps": steps})
        return is_trained(registry.lineage, with_resume(params, policy).model_copy(update={"train": train}))

    assert trained() and trained("must")
    assert not trained(steps=28)
    assert not trained("never"), "it asks for another training"
    registry.attach()
    registry.note("began", "never")
    try:
        assert trained("never") and not trained("8")
        registry.close("FAILED")
        assert not trained()
    finally:
        registry.note("began", "")
        registry.close("FINISHED")


def test_what_several_processes_can_not_do_is_said_once(make_workspace):
    workspace = make_workspace("refused")
    workspace.edit(**BATCH)

    ended = workspace.vrt("train", "--processes", "3")

    assert ended.returncode == 2
    assert ended.stdout.count("train.batch_size 4: expected a multiple of the 3 processes that share it") == 1, ended.stdout
    ended = workspace.vrt("train", variables={"VRT_PROCESSES": "many"})
    assert ended.returncode == 2 and "--processes: found 'many'; expected auto, or a number from 1 on" in ended.stdout, ended.stdout
    ended = workspace.vrt("train", "--processes", "2", "--machines", "2")
    assert ended.returncode == 2 and "--machines 2 and --meet None: expected both or neither" in ended.stdout


@pytest.fixture
def two_hosts(make_for_two, local_services, tmp_path):
    """Two workspaces on two hosts, of which the first has the services: this network, and a network namespace behind a cable."""
    first = make_for_two("hosts")
    first.edit(**BATCH)
    second = replace(first, root=tmp_path / "second", environment=first.environment | {"PYTHONPATH": str(tmp_path / "second")})
    shutil.copytree(first.root, second.root, symlinks=True)
    cable, far, space = f"vrt{os.getpid()}a", f"vrt{os.getpid()}b", f"vrt{os.getpid()}"
    ports = [str(urlsplit(address).port) for address in local_services.environment.values() if address.startswith("http://127.0.0.1:")]
    relay = [sys.executable, str(Path(__file__).with_name("relay.py"))]

    def there(*command: str) -> list[str]:
        return ["ip", "netns", "exec", space, *command]

    # A machine has a name of its own.
    named = ["unshare", "--uts", "sh", "-c", 'hostname far; exec "$@"', "sh"]
    made = subprocess.run(["ip", "netns", "add", space], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a second host needs the right to make network namespaces: {made.stderr.strip()}")
    relays = []
    try:
        for line in (
            f"ip link add {cable} type veth peer name {far} netns {space}",
            f"ip address add 10.213.7.1/24 dev {cable}",
            f"ip link set {cable} up",
            *(" ".join(there(*line.split())) for line in (f"ip address add 10.213.7.2/24 dev {far}", f"ip link set {far} up", "ip link set lo up")),
        ):
            subprocess.run(line.split(), check=True)
        # The addresses of the services are the same on both hosts.
        relays = [subprocess.Popen([*relay, "10.213.7.1", "127.0.0.1", *ports]), subprocess.Popen(there(*relay, "127.0.0.1", "10.213.7.1", *ports))]

        def start(*told: str) -> list[subprocess.Popen]:
            commands = [[sys.executable, *told], there(*named, sys.executable, *told)]
            started = []
            for workspace, command in zip((first, second), commands):
                output = workspace.log.open("w")
                started.append(subprocess.Popen(command, cwd=workspace.root, env=workspace.environment, stdout=output, stderr=subprocess.STDOUT))
            return started

        yield first, second, start, lambda state: subprocess.run(["ip", "link", "set", cable, state], check=True)
    finally:
        for relay_process in relays:
            relay_process.kill()
            relay_process.wait()
        subprocess.run(["ip", "netns", "delete", space], check=True)


# The first is where they meet, and where the services are.
@pytest.mark.long
@pytest.mark.parametrize("lost", [1, 0])
def test_a_host_that_vanishes_is_noticed_and_both_come_back_bit_identically(lost: int, two_hosts, two_uninterrupted):
    first, second, start, set_cable = two_hosts
    command = ["-m", "vrt", "train", "--processes", "1", "--machines", "2", "--meet", "10.213.7.1:29533"]
    hosts = start(*command)
    until(lambda: "checkpoint 8 registered" in first.log.read_text() + second.log.read_text(), hosts)
    # As when it loses its power: no connection is closed, and what runs there is seen no more.
    set_cable("down")
    for process in psutil.Process(hosts[lost].pid).children(recursive=True) + [hosts[lost]]:
        process.kill()
    gone = time.monotonic()

    hosts[1 - lost].wait(200)

    print(f"the other host ended after {time.monotonic() - gone:.1f} s")
    hosts[lost].wait()
    assert hosts[1 - lost].returncode == 1, first.log.read_text() + second.log.read_text()
    set_cable("up")
    again = start(*command)
    assert [host.wait(200) for host in again] == [0, 0], first.log.read_text() + second.log.read_text()
    assert went_on_after(first.log.read_text() + second.log.read_text()) >= 8
    assert_both_have_the_result_of(two_uninterrupted, first, second)


@pytest.mark.long
def test_what_the_leading_host_can_not_begin_ends_as_that_on_both(two_hosts):
    first, second, start, _ = two_hosts
    hosts = start("-m", "vrt", "train", "--processes", "1", "--machines", "2", "--meet", "10.213.7.1:29535", "--resume", "must")
    assert [host.wait(200) for host in hosts] == [2, 2], first.log.read_text() + second.log.read_text()
    assert "lost the others" in first.log.read_text() + second.log.read_text()


@pytest.mark.long
def test_two_hosts_have_a_flow_run_each_which_survive_a_killed_trainer_and_end_with_the_same_result(two_hosts, two_uninterrupted):
    first, second, start, _ = two_hosts
    flow = "from pipelines.train import train; train(processes=1, machines=2, meet='10.213.7.1:29534', retry_pause=0)"
    hosts = start("-c", flow)
    until(lambda: "checkpoint 8 registered" in first.log.read_text() + second.log.read_text(), hosts)
    trainers = [process for process in psutil.Process(hosts[1].pid).children(recursive=True) if "RANK" in environment_of(process)]
    # By the interface to the meeting point, on which the other machine is.
    assert environment_of(trainers[0])["NCCL_SOCKET_IFNAME"] == f"=vrt{os.getpid()}b"
    trainers[0].kill()

    assert [host.wait(400) for host in hosts] == [0, 0], first.log.read_text() + second.log.read_text()

    for workspace in (first, second):
        said = workspace.log.read_text()
        assert "| 2 | done |" in said and "Finished in state Completed()" in said, said
    assert_both_have_the_result_of(two_uninterrupted, first, second)
    # A machine that comes when all is done meets nobody.
    shutil.rmtree(first.root / "model")
    late = first.vrt("train", variables={"VRT_MACHINES": "2", "VRT_MEET": "10.213.7.1:29534"})
    assert late.returncode == 0 and "is trained and registered; fetching it" in late.stdout, late.stdout
    assert_both_have_the_result_of(two_uninterrupted, first, second)


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def assert_both_have_the_result_of(uninterrupted, first, second) -> None:
    for workspace in (first, second):
        assert_same_training(uninterrupted, workspace)
    for name in ("24_G.pth", "24_E.pth", "24_manifest.json"):
        assert (first.root / "model" / name).read_bytes() == (second.root / "model" / name).read_bytes()


def until(true: Callable[[], bool], running: list[subprocess.Popen]) -> None:
    for _ in range(6000):
        if true():
            return
        assert all(process.poll() is None for process in running)
        time.sleep(0.05)
    raise AssertionError("not within 300 s")
