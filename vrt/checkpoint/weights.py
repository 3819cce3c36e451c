"""Files of network weights as people pass them on: plain or nested `.pth` files, and `.safetensors`."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.serialize import load

SAFETENSORS = ".safetensors"
AVERAGED, TRAINED = "params_ema", "params"
"""Keys below which published files keep their weights. Where a file has both, the averaged ones are meant to be used, the others to be trained on."""


@dataclass(frozen=True)
class Weights:
    """A network's state dict, in its own order, and the key it was nested under in its file ("" for none)."""

    tensors: dict[str, torch.Tensor]
    nesting: str
    left_out: tuple[str, ...] = ()
    """What else its file held, beside that key: another set of weights, a step."""


def read_weights(path: Path, first: str = AVERAGED) -> Weights:
    """Read a file of weights, on the CPU and without running code from it; where it has several, those below the key `first`.

    Raises CheckpointError where there is no such file, or it holds anything but a network's weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected network weights, such as 40_G.pth or model{SAFETENSORS}")
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    content, nesting, left_out = load(path), "", ()
    for key in (first, AVERAGED, TRAINED):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            left_out = tuple(str(other) for other in content if other != key)
            content, nesting = content[key], key
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: found {type(content).__name__} with other things than tensors; expected a network's state dict")
    return Weights(dict(content), nesting, left_out)


def write_weights(weights: Weights, path: Path) -> None:
    """Write weights in the form that the name of `path` asks for. What is there already is not touched.

    Raises CheckpointError where `path` exists, can't be written, or has a name that asks for neither form.
    """
    if path.suffix not in (SAFETENSORS, ".pth"):
        raise CheckpointError(f"{path}: expected a name that ends in .pth or {SAFETENSORS}, found {path.suffix or 'no ending'!r}; choose one of them")
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        # Whole or not at all, and never over another file: a link fails where the name is taken.
        with suppress(FileNotFoundError):
            unfinished.unlink()
        _write(weights, unfinished, path.suffix)
        os.link(unfinished, path)
    except FileExistsError:
        raise CheckpointError(f"{path}: exists already; move it away, or choose another name") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror or error}); free space there or choose another place") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _write(weights: Weights, path: Path, suffix: str) -> None:
    if suffix == SAFETENSORS:
        from safetensors.torch import save

        # The format sorts its tensors: their own order and the nesting go with them.
        metadata = {"format": "pt", "vrt.order": json.dumps(list(weights.tensors)), "vrt.nesting": weights.nesting}
        # Each on its own: the format has no tensors that share memory, as tied ones do.
        path.write_bytes(save({key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.tensors.items()}, metadata))
        return
    content: Any = {weights.nesting: weights.tensors} if weights.nesting else weights.tensors
    with path.open("wb") as file:
        torch.save(content, file)


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            order = json.loads(metadata.get("vrt.order", "null")) or list(file.keys())
            return Weights({key: file.get_tensor(key) for key in order}, metadata.get("vrt.nesting", ""))
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read as safetensors ({error}); fetch it again") from error
