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
SHRUNK = (1, 2, 4, 8, 4, 2, 1)
"""How many times the seven stages of the body shorten the sides of a frame."""
KEPT_IN_A_BLOCK = {"fp32": 27, "tf32": 27, "bf16": 15}
"""What a GPU keeps for the gradient, by precision: as many times the block's input in float32. By benchmarks/results: with these numbers recipes
001 and 006 take within 5 % of what they took on an H100."""
KEPT_IN_A_STAGE = 7
"""The same of all else in a stage, its input taken."""
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
    share: int
    """Clips of a batch that each of them has."""


def memory(params: Params, processes: int, machines: int) -> Finding:
    """Whether there is room for what `processes` here keep from step to step, and on a GPU for the gradient of a clip."""
    share = max(params.train.batch_size // (processes * machines), 1)
    return judged_memory(params, _fullest_gpu(processes, share) or _of_machine(processes, share))


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
    if seen.gpu is None:
        return Finding("memory", "ok", f"{found}; what clips take on top, the first step tells", "should it be too much: lower train.clips_at_once")
    return _judged_clips(params, seen, found)


def _judged_clips(params: Params, seen: Memory, found: str) -> Finding:
    """What is to be said of a GPU that holds all but the clips."""
    wanted = params.train.clips_at_once
    tried = wanted == "auto" and not params.train.deterministic
    clips = 1 if wanted == "auto" else min(wanted, seen.share)
    each = clip_bytes(params)
    found = f"{found}, and each clip at once about {each / GB:.1f} GB"
    smaller = "lower train.crop or train.frames" if params.train.activation_checkpointing else "train.activation_checkpointing: true"
    remedy = f"should not even one fit: {smaller}" if clips == 1 else "lower train.clips_at_once, or set it to auto"
    if state_bytes(params) + clips * each > seen.total:
        return Finding("memory", "warning", f"{found}, which is more than there is", remedy)
    return Finding("memory", "ok", f"{found}; the start tries how many fit" if tried else found, remedy)


def _fullest_gpu(processes: int, share: int) -> Memory | None:
    used = min(processes, torch.cuda.device_count()) if torch.cuda.is_available() else 0
    return min((Memory(*torch.cuda.mem_get_info(gpu), gpu, 1, share) for gpu in range(used)), key=lambda seen: seen.free, default=None)


def _of_machine(processes: int, share: int) -> Memory:
    whole = psutil.virtual_memory()
    free, total = whole.available, whole.total
    limit = CONTROL_GROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        # Cached files give way to whoever needs their memory.
        cached = int(re.search(r"^inactive_file (\d+)$", (CONTROL_GROUP / "memory.stat").read_text(), re.MULTILINE)[1])
        used = int((CONTROL_GROUP / "memory.current").read_text()) - cached
        free, total = min(free, int(most) - used), min(total, int(most))
    return Memory(free, total, None, processes, share)


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


def clip_bytes(params: Params) -> int:
    """About what the gradient of one clip takes on a GPU; where blocks are computed again, inputs stay of all, and the rest of one at a time."""
    network, train = params.network, params.train
    tokens = train.frames * (train.crop // network.upscale) ** 2
    shrunk = SHRUNK + (1,) * (len(network.depths) - len(SHRUNK))
    inputs = [4 * tokens // side**2 * dim for side, dim in zip(shrunk, network.embed_dims)]
    of_blocks, of_one = sum(depth * size for depth, size in zip(network.depths, inputs)), KEPT_IN_A_BLOCK[train.precision]
    kept = of_blocks + of_one * max(inputs) if train.activation_checkpointing else of_one * of_blocks
    return kept + KEPT_IN_A_STAGE * sum(inputs)


def _trained_bytes(params: Params) -> int:
    return sum(value.nbytes for value in outline(params.network).parameters())
