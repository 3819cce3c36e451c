"""Whether the memory and the disk of this machine hold what a training keeps there."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from vrt.params import Params
from vrt.stages import CHECKPOINTS
from vrt.stages.finding import Finding
from vrt.stages.recipes import outline

GB = 1e9
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""That of the container, in a container; Linux says here what it may use (control groups, version 2)."""
SMALLER = "a smaller network (network.embed_dims, network.depths)"


@dataclass(frozen=True)
class Memory:
    """That of the fullest GPU that would train; where it trains without one, the machine's."""

    free: int
    """In bytes, like `total`."""
    total: int
    gpu: int | None
    processes: int
    """How many share it."""


def memory(params: Params) -> Finding:
    """Whether there is room for what a training keeps from step to step. What its clips take on top is not known before the first step."""
    return judged_memory(params, _fullest_gpu(params) or _of_machine(params))


def judged_memory(params: Params, seen: Memory) -> Finding:
    """What is to be said of the memory."""
    place = "the machine" if seen.gpu is None else f"GPU {seen.gpu}"
    needed = seen.processes * state_bytes(params)
    several = f" of {seen.processes} processes" if seen.processes > 1 else ""
    found = (
        f"{seen.free / GB:.1f} of {seen.total / GB:.1f} GB of {place} are free; weights, gradients, moments and E{several} take {needed / GB:.2f} GB"
    )
    if needed > seen.total:
        remedy = f"fewer train.processes, more memory, or {SMALLER}" if several else f"more memory, or {SMALLER}"
        return Finding("memory", "wrong", found, remedy)
    if needed > seen.free:
        others = "`nvidia-smi`" if seen.gpu is not None else "`top`"
        return Finding("memory", "unavailable", found, f"end what else takes it, which {others} lists")
    if seen.gpu is not None and params.train.clips_at_once == "auto":
        smaller = "lower train.crop or train.frames" if params.train.activation_checkpointing else "train.activation_checkpointing: true"
        return Finding("memory", "ok", f"{found}; the start tries how many clips fit in the rest", f"should not even one fit: {smaller}")
    return Finding("memory", "ok", f"{found}; what clips take on top, the first step tells", "should it be too much: lower train.clips_at_once")


def _fullest_gpu(params: Params) -> Memory | None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    used = gpus if params.train.processes == "auto" else min(params.train.processes, gpus)
    return min((Memory(*torch.cuda.mem_get_info(gpu), gpu, 1) for gpu in range(used)), key=lambda seen: seen.free, default=None)


def _of_machine(params: Params) -> Memory:
    whole = psutil.virtual_memory()
    free, total = whole.available, whole.total
    limit = CONTROL_GROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        # Cached files give way to whoever needs their memory.
        cached = int(re.search(r"^inactive_file (\d+)$", (CONTROL_GROUP / "memory.stat").read_text(), re.MULTILINE)[1])
        used = int((CONTROL_GROUP / "memory.current").read_text()) - cached
        free, total = min(free, int(most) - used), min(total, int(most))
    return Memory(free, total, None, 1 if params.train.processes == "auto" else params.train.processes)


def disk(params: Params) -> Finding:
    """Room for the checkpoints that are kept here, one that is being written and one that waits for its upload."""
    place = CHECKPOINTS if CHECKPOINTS.exists() else Path(".")
    free, needed = shutil.disk_usage(place).free, checkpoint_bytes(params) * (params.checkpoints.keep_last + params.checkpoints.keep_best + 2)
    found = f"{free / GB:.1f} GB free; the checkpoints kept here take up to {needed / GB:.1f} GB"
    if free < needed:
        return Finding("disk", "wrong", found, f"free space there ({place.resolve()}), or lower checkpoints.keep_last")
    return Finding("disk", "ok", found)


def checkpoint_bytes(params: Params) -> int:
    """G with its constants, E, and the two moments that Adam keeps of each parameter."""
    network = outline(params.network)
    constants = sum(value.nbytes for value in network.buffers())
    copies = 2 if params.train.ema_decay else 1
    return copies * (_trained_bytes(params) + constants) + 2 * _trained_bytes(params)


def state_bytes(params: Params) -> int:
    """What one process keeps from step to step: all that a checkpoint holds, and the gradients."""
    return checkpoint_bytes(params) + _trained_bytes(params)


def _trained_bytes(params: Params) -> int:
    return sum(value.nbytes for value in outline(params.network).parameters())
