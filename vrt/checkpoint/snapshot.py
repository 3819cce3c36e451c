"""Copies of live state in host memory: the only part of a save that the training waits for."""

import sys
from typing import Any

import torch


class HostCopy:
    """Copies trees (dicts, lists, tuples) of tensors into host buffers that are allocated once and reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}

    def of(self, tree: Any) -> Any:
        """`tree` with every tensor replaced by its copy; overwritten by the next call."""
        copied = self._copy(tree, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, tree: Any, path: tuple) -> Any:
        if isinstance(tree, torch.Tensor):
            return self._buffer(tree, path).copy_(tree.detach(), non_blocking=True)
        if isinstance(tree, dict):
            return type(tree)((self._copy(key, path), self._copy(value, (*path, key))) for key, value in tree.items())
        if isinstance(tree, list | tuple):
            return type(tree)(self._copy(value, (*path, i)) for i, value in enumerate(tree))
        # Pickle writes a string once per object, not per value: a resumed run's equal strings must be one object, as a fresh run's are.
        return sys.intern(tree) if isinstance(tree, str) else tree

    def _buffer(self, tensor: torch.Tensor, path: tuple) -> torch.Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned memory lets the copy off a GPU run at full speed.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        return buffer
