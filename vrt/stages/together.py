"""`vrt train` with several processes: torchrun starts them, and what became of them is told in one exit code."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from vrt.checkpoint.curator import Curator
from vrt.checkpoint.errors import StoreUnavailable
from vrt.checkpoint.policy import ResumePolicy
from vrt.checkpoint.tracking import Lineage
from vrt.data.clips import PreparedData
from vrt.data.sampler import Share, check_sampling
from vrt.lifecycle import EXIT_CONTINUE_ME, EXIT_DONE, EXIT_FAILED, OUTCOME, SECONDS_TO_SAVE, StopRequest, held_back, torchrun_rank
from vrt.observe import log
from vrt.params import Params, load_params, with_resume
from vrt.stages import PREPARED
from vrt.stages.lineage import lineage_of
from vrt.stages.result import fetch_result, has_result
from vrt.stages.start import begun

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_END = 30.0
"""How long torchrun has, once its processes have failed."""
SECONDS_TO_MEET = 600.0
"""How long a machine waits for the others."""


def train_together(params_path: Path, resume: str | None, processes: int | str | None, machines: int, meet: str | None) -> int | None:
    """Train with as many processes as asked for, on this machine and (`machines`) on others. Returns the exit code of the one that leads here.

    None: this process is to train itself, since it is one of those, or the only one.
    Raises ValueError for whatever is wrong with params and data, once, before any process starts; StoreUnavailable where the other
    machines do not come.
    """
    if torchrun_rank() is not None:
        return None
    if (machines > 1) != (meet is not None):
        raise ValueError(f"--machines {machines} and --meet {meet}: expected both or neither; give them alike on every machine")
    params = load_params(params_path)
    count = processes_here(params, processes or params.train.processes, machines)
    if count * machines == 1:
        return None
    if resume is not None:
        params = with_resume(params, resume)
    data = PreparedData.open(PREPARED)
    check_sampling(data, params)
    lineage, last = lineage_of(params, data), params.train.total_steps
    # What is fetched below is at hand when it is told to stop: that is finished first.
    with StopRequest() as stop:
        if machines > 1 and is_trained(lineage, params):
            # The others have ended, and nobody will come to meet this one.
            fetch_result(lineage, params_path, last)
            return EXIT_DONE
        here = loopback() if meet is None else on_the_way_to(meet)
        if meet is not None and not here.is_meeting_point and not wait_for_host(meet, SECONDS_TO_MEET, lambda: stop.reason is not None):
            return EXIT_CONTINUE_ME
        log.info("training with %d processes%s", count * machines, f" on {machines} machines" if machines > 1 else "")
        told = ["--params", str(params_path), *(["--resume", resume] if resume else [])]
        with tempfile.TemporaryDirectory(prefix="vrt-") as folder:
            command = _torchrun(count, meeting(machines, meet, here, params.name), told)
            code = _launch(command, Path(folder) / "outcome", params.train.threads, here.name, stop)
        if code is None:
            if meet is None:
                return EXIT_FAILED
            raise StoreUnavailable(
                f"--meet {meet}: not all of the {machines} machines met there within {SECONDS_TO_MEET:.0f} s, or others were still there; start the "
                "same command on each of them"
            )
        if code == EXIT_DONE and not has_result(lineage, last):
            # Another machine led. Not in the process that trained: torchrun gives those that end later than others five minutes.
            fetch_result(lineage, params_path, last)
        return code


def meeting(machines: int, meet: str | None, here: "Interface", name: str) -> list[str]:
    """What tells torchrun where the machines of the training `name` meet."""
    if meet is None:
        return ["--standalone"]
    # torchrun knows its machine by name only, not by its addresses.
    conf = f"is_host={here.is_meeting_point},join_timeout={SECONDS_TO_MEET:.0f}"
    where = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", meet, "--rdzv-id", name]
    return [*where, "--local-addr", here.address, "--rdzv-conf", conf]


def _torchrun(processes: int, where: list[str], told: list[str]) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *where]
    command += ["--max-restarts", "0", "--monitor-interval", "0.5", "--shutdown-timeout", str(SECONDS_TO_SAVE)]
    return [*command, "-m", "vrt", "train", *told]


def is_trained(lineage: Lineage, params: Params) -> bool:
    """Whether the last step is registered, nothing was missing then, and the params don't ask for it to be trained anew."""
    registry = Curator(lineage)
    latest = registry.latest()
    if latest is None or latest.step != params.train.total_steps or not registry.attach() or not registry.finished:
        return False
    policy = ResumePolicy.parse(params.checkpoints.resume)
    return not policy.begins or begun(registry, policy)


def processes_here(params: Params, wanted: int | str, machines: int = 1) -> int:
    """How many processes train on this machine. Raises ValueError where they can't share the batch, or have no GPU each."""
    gpus, batch = torch.cuda.device_count(), params.train.batch_size
    if wanted == "auto":
        return max(count for count in range(1, max(gpus, 1) + 1) if count == 1 or batch % (count * machines) == 0)
    count = int(wanted)
    Share(0, count * machines).samples(batch)
    if gpus and count > gpus:
        raise ValueError(f"train.processes {count}: expected at most one for each of the {gpus} GPUs here; lower it, or set it to auto")
    return count


class Interface(NamedTuple):
    """A network interface of this machine."""

    name: str
    address: str
    is_meeting_point: bool


def loopback() -> Interface:
    """The interface of a machine that trains alone."""
    return _interface_of("127.0.0.1", "127.0.0.1")


def on_the_way_to(meet: str) -> Interface:
    """The interface by which this machine reaches HOST:PORT. Raises ValueError where that is no such address."""
    host, _, port = meet.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--meet {meet}: expected HOST:PORT, such as 10.0.0.1:29500")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Sends nothing: it only asks for the way.
            probe.connect(address)
            return _interface_of(probe.getsockname()[0], address[0])
    except OSError as error:
        raise ValueError(f"--meet {meet}: this machine knows no way there ({error.strerror}); expected an address that all machines reach") from None


def wait_for_host(meet: str, patience: float, give_up: Callable[[], bool]) -> bool:
    """Until something answers at HOST:PORT, for which torchrun itself would wait a minute. False: given up before.

    Raises StoreUnavailable after `patience` seconds: it may come yet.
    """
    host, _, port = meet.rpartition(":")
    ends, said = time.monotonic() + patience, False
    while not give_up():
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
            return True
        except OSError as error:
            if time.monotonic() > ends:
                raise StoreUnavailable(
                    f"--meet {meet}: nothing answered there for {patience:.0f} s ({error}); start the same command on the machine that has "
                    "this address, then here again"
                ) from None
        if not said:
            log.info("waiting for the machine with %s", meet)
            said = True
        time.sleep(1)
    return False


def _interface_of(address: str, meet: str) -> Interface:
    owners = (name for name, addresses in psutil.net_if_addrs().items() if any(one.address == address for one in addresses))
    return Interface(next(owners), address, address == meet)


def _launch(command: list[str], outcome: Path, threads: int, interface: str, stop: StopRequest) -> int | None:
    """Run torchrun to its end. Returns what its first process here ended with; None: torchrun ended, and had never started one."""
    # torchrun would set one thread and warn of it. Left alone, gloo looks for the machine's own name, which leads nowhere without a network.
    sockets = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    environment = {"OMP_NUM_THREADS": str(threads), **sockets, **os.environ, OUTCOME: str(outcome)}
    with held_back(signal.SIGUSR1):
        # In a group of its own: a signal to this one's asks to save, but torchrun would take it for its own end.
        torchrun = subprocess.Popen(command, env=environment, process_group=0)
    with torchrun:
        started = passed_on = False
        seen = time.monotonic()
        while torchrun.poll() is None:
            workers = _workers_of(torchrun.pid)
            started = started or bool(workers)
            seen = time.monotonic() if workers else seen
            if started and time.monotonic() - seen > SECONDS_TO_END and _code_left(outcome) not in (EXIT_DONE, EXIT_CONTINUE_ME):
                # It tells the others what happened here, for minutes if the host that they meet at is gone.
                torchrun.kill()
            if stop.reason and not passed_on and (workers or not started):
                passed_on = True
                if workers:
                    _ask_to_stop(workers)
                else:
                    # It waits for other machines: there is nothing to save.
                    torchrun.terminate()
            try:
                torchrun.wait(SECONDS_BETWEEN_LOOKS)
            except subprocess.TimeoutExpired:
                continue
    if not started:
        return EXIT_CONTINUE_ME if stop.reason else None
    # Only where all is trained and registered is it done: a process that dies after that takes nothing back.
    return _code_left(outcome)


def _code_left(outcome: Path) -> int:
    said = outcome.with_name(f"{outcome.name}.0")
    return int(said.read_text()) if said.exists() else EXIT_FAILED


def _workers_of(torchrun: int) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(torchrun).children() if "TORCHELASTIC_RUN_ID" in child.environ()]
    except psutil.NoSuchProcess:
        # One ended while we looked: the next look tells.
        return []


def _ask_to_stop(workers: list[psutil.Process]) -> None:
    """Ask processes that torchrun started to save and end."""
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGUSR1)
