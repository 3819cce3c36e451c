"""A step that is the same to the last bit, or an error that says why not."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """While the block runs, refuse every operator whose result may vary from run to run. Enter it before the first work on a GPU.

    On CPUs the training has none; results there depend on nothing but the number of threads and the kind of CPU.
    Raises ValueError, which names the operator, where the block came to one that has no deterministic form on its device.
    """
    if not wanted:
        yield
        return
    # Without a workspace of its own cuBLAS may split its sums differently each time; it reads this once, when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        refused = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if refused is None:
            raise
        raise ValueError(
            f"train.deterministic: PyTorch has no deterministic {refused[1]} for this device; "
            "set train.deterministic to false (steps then vary in their last bits), or train on a CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
