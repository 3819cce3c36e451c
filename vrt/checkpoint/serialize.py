"""Tensors to files and back, in the form KAIR writes and reads: plain `torch.save` of plain state dicts."""

import errno
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vrt.checkpoint.errors import CheckpointError, MachineShort
from vrt.checkpoint.phases import Phase, reached


class HashingWriter:
    """A write-only file that knows the SHA-256 and the size of what went through it.

    torch.save embeds the name of a file it opens itself; through an open file equal content gives equal bytes.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None
        """Why a write failed: torch.save reports only an unexpected position in the file."""

    def write(self, data: bytes) -> int:
        """Write and take into the digest. Raises OSError, which stays in `error`."""
        self._sha256.update(data)
        self.size += len(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        reached(Phase.WRITE)
        return written

    def flush(self) -> None:
        """Hand what is written to the operating system, which may still hold it back from the disk."""
        self._file.flush()

    @property
    def sha256(self) -> str:
        """Hex, of all that went through so far."""
        return self._sha256.hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> Any:
    """What a checkpoint file holds, on the CPU, without running code from it.

    Raises CheckpointError where the file is truncated, no torch file, or a pickle of anything but plain data; MachineShort where this machine
    can't hold or read it, which says nothing of the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if _is_the_machines(error):
            told = f"{path}: this machine can't read it ({_first_line(error)}), which says nothing of the file; free memory, or use another machine"
            raise MachineShort(told) from error
        # Depending on where a file is damaged, torch raises about any error, some of them without a word.
        raise CheckpointError(f"{path}: can't be read as tensors and plain values ({_first_line(error)}); restore it or delete it") from error


def _is_the_machines(error: Exception) -> bool:
    """Whether it is for want of memory, file handles or a working disk. torch's allocator for CPUs has no error of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fitting(weights: Mapping[str, torch.Tensor], network: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What of `weights` has the name and the shape that `network` has, and the rest as `misfits` lists it.

    By name, never by position: two networks may have the same shapes in another order.
    """
    taken = {key: value for key, value in weights.items() if key in network and value.shape == network[key].shape}
    return taken, misfits(weights, network)


def misfits(weights: Mapping[str, torch.Tensor], network: Mapping[str, torch.Tensor]) -> list[str]:
    """Every way in which `weights` is not a state dict of `network`: missing, unexpected and misshapen keys. Empty: it fits."""
    problems = [f"missing: {key}" for key in network if key not in weights]
    problems += [f"unexpected: {key}" for key in weights if key not in network]
    for key in network:
        if key in weights and weights[key].shape != network[key].shape:
            problems.append(f"misshapen: {key} is {list(weights[key].shape)}, the network has {list(network[key].shape)}")
    return problems


def optimizer_misfits(saved: Any, groups: Sequence[Sequence[tuple[str, torch.Tensor]]]) -> list[str]:
    """Every way in which `saved`, an optimizer's state dict, is not of an optimizer with these groups of named parameters. Empty: it fits.

    torch matches parameters by position and checks only how many there are: state of the wrong shape would fail at the next step, or broadcast.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping) or not isinstance(saved.get("param_groups"), list):
        return [f"found {type(saved).__name__}; expected an optimizer's state dict with `state` and `param_groups`"]
    indices = [group.get("params") if isinstance(group, Mapping) else None for group in saved["param_groups"]]
    if not all(isinstance(group, list) for group in indices):
        return ["a parameter group has no list of parameters"]
    sizes, expected = [len(group) for group in indices], [len(group) for group in groups]
    if sizes != expected:
        return [f"its groups have {sizes} parameters, the network's have {expected}"]
    problems = []
    for group, named in zip(indices, groups):
        for index, (name, parameter) in zip(group, named):
            state = saved["state"].get(index, {})
            if not isinstance(state, Mapping):
                problems.append(f"the state of {name} is {type(state).__name__}; expected values by name")
                continue
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                    problems.append(f"misshapen: {key} of {name} is {list(value.shape)}, the parameter is {list(parameter.shape)}")
    return problems
