"""Tensors to files and back, in the form KAIR writes and reads: plain `torch.save` of plain state dicts."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vrt.checkpoint.errors import CheckpointError
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
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> Any:
    """What a checkpoint file holds, on the CPU, without running code from it.

    Raises CheckpointError where the file is truncated, no torch file, or a pickle of anything but plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Depending on where a file is damaged, torch raises about any error, some of them without a word.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: can't be read as tensors and plain values ({reason}); restore it or delete it") from error


def load_network(path: Path) -> dict[str, torch.Tensor]:
    """Network weights by name, plain or nested under `params` / `params_ema` as some published files have them."""
    content = load(path)
    for nesting in ("params_ema", "params"):
        if isinstance(content, Mapping) and isinstance(content.get(nesting), Mapping):
            content = content[nesting]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: found {type(content).__name__} with other things than tensors; expected a network's state dict")
    return dict(content)


def misfits(weights: Mapping[str, torch.Tensor], network: Mapping[str, torch.Tensor]) -> list[str]:
    """Every way in which `weights` is not a state dict of `network`: missing, unexpected and misshapen keys. Empty: it fits."""
    problems = [f"missing: {key}" for key in network if key not in weights]
    problems += [f"unexpected: {key}" for key in weights if key not in network]
    for key in network:
        if key in weights and weights[key].shape != network[key].shape:
            problems.append(f"misshapen: {key} is {list(weights[key].shape)}, the network has {list(network[key].shape)}")
    return problems
