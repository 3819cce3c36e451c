"""Processes that train together: what they add up, what they agree on, and how each notices that another is gone.

torchrun starts them and numbers them (RANK, WORLD_SIZE, LOCAL_RANK); rank 0 leads: it alone saves, validates and speaks to services.

Gradients are added up here and not by DistributedDataParallel. That regroups its sums after the first step of every process, so a resumed
training would differ in its last bits from one that was never interrupted; it must search for parameters without a gradient while some are
frozen; and between the GPUs of one machine adding up VRT's 31 million gradients takes milliseconds, so there is little to hide behind the
backward pass.
"""

import io
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vrt.lifecycle import torchrun_rank, within

SECONDS_OF_SILENCE = 20.0
"""After these a process that says nothing is taken for dead: its host is, or the network to it."""
SECONDS_BETWEEN_BEATS = 2.0
# Not what finds the dead, but how long the others wait for rank 0 while it fetches a checkpoint, waits for a lease, or validates.
LONGEST_WAIT = timedelta(days=2)
SECONDS_TO_CONNECT = 300.0
"""For NCCL, which takes seconds, once all processes are there."""
LONGEST_FACTS = 4096


class PeerLost(RuntimeError):
    """A process that trains with this one is gone."""


class Team:
    """The processes of one training, seen from one of them. By itself: a process that trains alone."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether it is the process that saves, publishes and validates for all."""
        return self.rank == 0

    @property
    def first_away(self) -> bool:
        """Whether it is the first process of a machine that the one which leads is not on."""
        return False

    def total(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each number over all processes. All must call it at the same point. Raises PeerLost."""
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return self.total(flag)[0] > 0

    def connect(self, device: torch.device) -> None:
        """Connect the devices that are to add up, before anything is computed. Raises PeerLost, and RuntimeError where they can't."""

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same bits in each. Raises PeerLost."""

    def from_leader(self, value: Any) -> Any:
        """Rank 0's `value`, a tree of tensors (which arrive on the CPU) and plain values, in every process."""
        return value

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raises ValueError in every process, naming ranks and values, where not all were started with the same facts."""

    def leave_word(self, code: int) -> None:
        """Where this process leads: tell the others, which are about to lose it, the exit code that it fails with."""

    def word_of_leader(self) -> int | None:
        """The exit code that rank 0, now lost, said it fails with; None: it said none, or this is rank 0."""
        return None


ALONE = Team()


class Torchrun(Team):
    """The team that torchrun made of this process and others."""

    def __init__(self, rank: int, size: int, heart: "Heart"):
        self.rank, self.size, self._heart = rank, size, heart
        self.seconds = 0.0
        """Spent on adding up so far, waiting for slower processes included."""
        self.lost = False
        """Whether an exchange raised PeerLost."""

    @property
    def first_away(self) -> bool:
        """Read off what torchrun tells each process in its environment."""
        # torchrun numbers the machines as it does their processes: from that of rank 0 on.
        return os.environ["GROUP_RANK"] != "0" and os.environ["LOCAL_RANK"] == "0"

    def total(self, *numbers: float) -> tuple[float, ...]:
        """Added up in float64."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self._sum(sums)
        return tuple(sums.tolist())

    def connect(self, device: torch.device) -> None:
        """A first sum, of GPUs alone. Raises PeerLost, and RuntimeError where that is not over in time, saying where to look."""
        if device.type != "cuda":
            return
        self.total(0.0)
        # NCCL connects as its first sum starts, which does not return before: only from beside it can the heart be heard meanwhile. And it takes
        # memory that torch knows nothing of, which must not be missed where `vrt.training.memory` fills what is free.
        with self._others_lost():
            connected = within(SECONDS_TO_CONNECT, lambda: first_sum(device), self._hear)
        if not connected:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} on {platform.node()}: NCCL has not connected its GPU with those of the others within "
                f"{SECONDS_TO_CONNECT:.0f} s; NCCL_DEBUG=INFO tells by which way it tries, NCCL_SOCKET_IFNAME names the network interface to take, "
                "and no firewall may be between them"
            )

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """All tensors as one, in a single exchange; on GPUs after another one, beside them, that waits for all to be there."""
        if tensors[0].is_cuda:
            # The sum waits for the backward pass anyway, which is no part of what adding up takes.
            torch.cuda.synchronize(tensors[0].device)
        started = time.monotonic()
        if tensors[0].is_cuda:
            # Who is slow is waited for here, and who died is noticed, since gloo's connections close. Within a machine NCCL's sum would wait for
            # the dead until their heart was silent for long enough.
            self.total(0.0)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._sum(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])
        self.seconds += time.monotonic() - started

    def from_leader(self, value: Any) -> Any:
        """Its size is broadcast first, then the value as bytes of torch.save, of which no code is run. Raises PeerLost."""
        file = io.BytesIO()
        if self.leads:
            torch.save(value, file)
        size = torch.tensor([file.tell()])
        self._wait(lambda: dist.broadcast(size, 0, async_op=True))
        data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8) if self.leads else torch.empty(int(size), dtype=torch.uint8)
        self._wait(lambda: dist.broadcast(data, 0, async_op=True))
        return value if self.leads else torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Every process gathers the facts of all. Raises ValueError where they differ, PeerLost where a process is gone."""
        everyone = [torch.zeros(LONGEST_FACTS, dtype=torch.uint8) for _ in range(self.size)]
        own = json.dumps(dict(facts)).encode()
        assert len(own) <= LONGEST_FACTS
        self._wait(lambda: dist.all_gather(everyone, torch.frombuffer(bytearray(own.ljust(LONGEST_FACTS)), dtype=torch.uint8), async_op=True))
        theirs = [json.loads(told.numpy().tobytes()) for told in everyone]
        differing = []
        for key in facts:
            if len({told[key] for told in theirs}) > 1:
                differing.append(f"{key}: " + ", ".join(f"rank {rank} {told[key]}" for rank, told in enumerate(theirs)))
        if differing:
            listed = "\n  ".join(differing)
            raise ValueError(f"the {self.size} processes of this training differ, but all must be started alike:\n  {listed}")

    def leave_word(self, code: int) -> None:
        """Left with the host that the processes meet at; a leader that lost the others leaves none."""
        if self.leads and not self._heart.missed:
            self._heart.leave_word(str(code))

    def word_of_leader(self) -> int | None:
        """Read from where it left it; None also where that host is gone."""
        word = "" if self.leads or self._heart.missed else self._heart.word()
        return int(word) if word else None

    def _sum(self, tensor: torch.Tensor) -> None:
        self._wait(lambda: dist.all_reduce(tensor, async_op=True))

    def _wait(self, start: Callable[[], dist.Work]) -> None:
        with self._others_lost():
            work = start()
            # Looked at, not waited for: a host that lost its power closes no connection, and only the silence of its heart shows it.
            pause = 1e-5
            while not work.is_completed():
                self._heart.check()
                time.sleep(pause)
                pause = min(2 * pause, 2e-3)
            work.wait()

    def _hear(self) -> bool:
        self._heart.check()
        return False

    @contextmanager
    def _others_lost(self) -> Iterator[None]:
        """Whatever an exchange raises while the block runs means that others are lost: PeerLost."""
        try:
            yield
        except PeerLost:
            self.lost = True
            raise
        except RuntimeError as error:
            self.lost = True
            raise PeerLost(self._farewell(str(error).splitlines()[0])) from error

    def _farewell(self, how: str) -> str:
        return (
            f"rank {self.rank} of {self.size} on {platform.node()} lost the others ({how}): one of them was killed or ended; "
            "its own last lines say why, as far as it could. Run the same again: it goes on from the newest checkpoint"
        )


class Heart:
    """Beats into the store that torchrun's agent keeps for all, and listens for the others."""

    def __init__(self, rank: int, size: int):
        self._rank, self._others = rank, [other for other in range(size) if other != rank]
        # Of its own: a connection that waits for an answer serves nobody else meanwhile.
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=SECONDS_OF_SILENCE)
        )
        # Attempts of one torchrun would hear each other's beats.
        self._prefix = f"vrt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._lost = ""
        self._beats = self._beats_seen = 0
        self._silence, self._checked = 0.0, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises PeerLost once another process was silent for too long."""
        # The store's own time limit is none for a host that lost its power: a beat that it never acknowledges just waits.
        if not self._lost and self._silent_for() > SECONDS_OF_SILENCE:
            silence = f"has said nothing for {SECONDS_OF_SILENCE:.0f} s: it or the network to it is gone"
            self._lost = f"the host that torchrun's processes meet at {silence}"
        if self._lost:
            raise PeerLost(self._lost)

    def _silent_for(self) -> float:
        """Seconds without a beat that got through. Only those count in which one could have: a busy process keeps its own heart from beating."""
        now = time.monotonic()
        self._silence = 0.0 if self._beats != self._beats_seen else self._silence + min(now - self._checked, 1.0)
        self._beats_seen, self._checked = self._beats, now
        return self._silence

    @property
    def missed(self) -> bool:
        """Whether another process was silent for too long, without raising as `check` does."""
        return bool(self._lost)

    def leave_word(self, word: str) -> None:
        """Keep a word for the others, for as long as the host that they meet at is there."""
        with suppress(RuntimeError):
            # Without that host the others are about to end anyway, by the silence of this heart.
            self._store.set(f"{self._prefix}/word", word)

    def word(self) -> str:
        """The word that was left; nothing: there is none."""
        try:
            key = f"{self._prefix}/word"
            return self._store.get(key).decode() if self._store.check([key]) else ""
        except RuntimeError:
            # The host is gone, and the word with it.
            return ""

    def stop(self) -> None:
        """Beat no more, and wait for the beat at hand, if it comes to an end."""
        self._stopped.set()
        # One that waits for a host that is gone does not, whether that was noticed already or not.
        self._thread.join(SECONDS_BETWEEN_BEATS)

    def _beat(self) -> None:
        heard = {other: (-1, time.monotonic()) for other in self._others}
        while not self._stopped.wait(SECONDS_BETWEEN_BEATS):
            try:
                self._store.add(f"{self._prefix}/beat/{self._rank}", 1)
                counts = {other: self._store.add(f"{self._prefix}/beat/{other}", 0) for other in self._others}
                self._beats += 1
            except RuntimeError as error:
                self._lost = f"the host that torchrun's processes meet at does not answer ({str(error).splitlines()[0]})"
                return
            now = time.monotonic()
            for other, count in counts.items():
                if count != heard[other][0]:
                    heard[other] = (count, now)
                elif now - heard[other][1] > SECONDS_OF_SILENCE:
                    self._lost = f"rank {other} has said nothing for {SECONDS_OF_SILENCE:.0f} s: its host or the network to it is gone"
                    return


def first_sum(device: torch.device) -> None:
    """Add up a number over all processes on their GPUs, and wait for it."""
    # The current GPU is a thread's own.
    torch.cuda.set_device(device)
    dist.all_reduce(torch.zeros(1, device=device))
    torch.cuda.synchronize(device)


def device_here() -> torch.device:
    """The GPU of this process, one for each process of the machine, made its current one; or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    # Compiled kernels run on the current device, whatever their tensors say.
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team that this process trains in; while the block runs, its processes can reach each other.

    A process that the block left with an error, or that lost others in it, can't join again.
    """
    if torchrun_rank() is None:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    heart = Heart(dist.get_rank(), dist.get_world_size())
    team = Torchrun(dist.get_rank(), dist.get_world_size(), heart)
    try:
        yield team
    finally:
        heart.stop()
    # Not after an error: to end it properly would be to wait for an answer of the dead, or of those that wait for this process in a sum.
    # It goes with this process, which ends right away (`vrt.lifecycle.leave`).
    if not (team.lost or heart.missed):
        dist.destroy_process_group()
