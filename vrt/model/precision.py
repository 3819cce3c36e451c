"""In which precision a GPU computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """While the block runs, a GPU's matrix products are computed in fp32, or (tf32, bf16) in what its tensor cores have for fp32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
