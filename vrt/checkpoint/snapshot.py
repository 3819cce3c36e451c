"""Copies of live state in host memory: the only part of a save that the training waits for."""

import sys
from bisect import bisect_left
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

# Two fill the memory bus of a small machine; more than a few gain nothing on a large one.
MOST_THREADS = 4


class Aliases:
    """A part of a tree that holds the very same tensors each time, such as a network's state dict taken once: how to copy it is planned once, too."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors


class HostCopy:
    """Copies trees (dicts, lists, tuples) of tensors into host buffers that are allocated once and reused."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}
        self._plans: dict[Aliases, _Plan] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._arrived: torch.cuda.Event | None = None

    def of(self, tree: Any, constants: Collection[torch.Tensor] = ()) -> Any:
        """`tree` with every tensor replaced by its copy; overwritten by the next call.

        `constants` are tensors of the tree that are not expected to change: copied once, and again only where one was replaced or written to.
        What lives on a GPU arrives later (`wait`); kernels that are started after this call see to it that they don't overtake the copies.
        """
        walk = _Walk(constants, self._plans)
        copied = walk.copy(tree, self._kept, "")
        if walk.live:
            self._copy_from_host(walk)
        if walk.on_gpu:
            self._copy_from_gpu(walk.on_gpu)
        # Not before: of a copy that an exception interrupted nothing counts.
        for buffer, content in walk.filled:
            buffer.content = content
        return copied

    def wait(self) -> None:
        """Until the newest copy is complete. Call it, from any thread, before reading what `of` returned."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def _copy_from_host(self, walk: "_Walk") -> None:
        threads = min(torch.get_num_threads(), MOST_THREADS)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="snapshot")

        def copy(share: slice) -> None:
            with torch.no_grad():
                torch._foreach_copy_(walk.into[share], walk.live[share])

        list(self._pool.map(copy, walk.shares(threads)))

    def _copy_from_gpu(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if self._stream is None:
            self._stream, self._arrived = torch.cuda.Stream(), torch.cuda.Event()
        training = torch.cuda.current_stream()
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for host, live in pairs:
                host.copy_(live.detach(), non_blocking=True)
            self._arrived.record()
        # The GPU waits, the loop does not: the next step's kernels must not change what is still being copied.
        training.wait_event(self._arrived)


class _Buffer:
    """Host memory for one tensor of the tree."""

    __slots__ = ("host", "shape", "dtype", "constant", "content")

    def __init__(self, live: torch.Tensor, constant: bool):
        self.shape, self.dtype, self.constant = live.shape, live.dtype, constant
        # Pinned memory lets the copy off a GPU run at full speed, and beside the loop.
        self.host = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
        self.content: tuple[int, int] | None = None
        """Of a constant: where the tensor was, and how often written to, when it was copied."""


@dataclass(frozen=True)
class _Plan:
    """How `Aliases` are copied: all on one device."""

    copied: dict[str, torch.Tensor]
    into: list[torch.Tensor]
    live: list[torch.Tensor]
    constants: list[tuple[_Buffer, torch.Tensor]]


class _Walk:
    """One pass over a tree: sorts its tensors by how they are copied, and builds the tree of their copies."""

    def __init__(self, constants: Collection[torch.Tensor], plans: dict[Aliases, "_Plan"]):
        self._constants = {tensor.data_ptr() for tensor in constants}
        self._plans = plans
        self.into: list[torch.Tensor] = []
        self.live: list[torch.Tensor] = []
        self.on_gpu: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.filled: list[tuple[_Buffer, tuple[int, int]]] = []
        """Constants that are among them, and what they hold once they are copied."""

    def copy(self, tree: Any, kept: dict[Any, Any], place: Any) -> Any:
        """The copy of `tree`, whose buffers are kept under `place` of `kept`, a dict that mirrors the tree above."""
        if isinstance(tree, torch.Tensor):
            return self._tensor(tree, kept, place)
        if isinstance(tree, Aliases):
            return self._aliases(tree, kept, place)
        if isinstance(tree, dict):
            below = kept.setdefault(place, {})
            copied = type(tree)()
            # Thousands of tensors: a call more for each is milliseconds of the training's time.
            for key, value in tree.items():
                name = sys.intern(key) if isinstance(key, str) else key
                copied[name] = self._tensor(value, below, name) if isinstance(value, torch.Tensor) else self.copy(value, below, name)
            return copied
        if isinstance(tree, list | tuple):
            below = kept.setdefault(place, {})
            return type(tree)(self.copy(value, below, i) for i, value in enumerate(tree))
        # Pickle writes a string once per object, not per value: a resumed run's equal strings must be one object, as a fresh run's are.
        return sys.intern(tree) if isinstance(tree, str) else tree

    def _tensor(self, live: torch.Tensor, kept: dict[Any, Any], place: Any) -> torch.Tensor:
        buffer = kept.get(place)
        if buffer is None or buffer.shape != live.shape or buffer.dtype != live.dtype:
            buffer = kept[place] = _Buffer(live, live.data_ptr() in self._constants)
        if buffer.constant:
            self._fill([(buffer, live)])
        elif live.is_cuda:
            self.on_gpu.append((buffer.host, live))
        else:
            self.into.append(buffer.host)
            self.live.append(live)
        return buffer.host

    def _aliases(self, tree: Aliases, kept: dict[Any, Any], place: Any) -> Any:
        plan = self._plans.get(tree)
        if plan is None:
            copied = self.copy(tree.tensors, kept, place)
            pairs = [(kept[place][key], live) for key, live in tree.tensors.items()]
            changing = [pair for pair in pairs if not pair[0].constant]
            into, live = [buffer.host for buffer, _ in changing], [tensor for _, tensor in changing]
            self._plans[tree] = _Plan(copied, into, live, [pair for pair in pairs if pair[0].constant])
            return copied
        self._fill(plan.constants)
        self._add(plan.into, plan.live)
        return plan.copied

    def _fill(self, constants: list[tuple[_Buffer, torch.Tensor]]) -> None:
        """Copy those that are not what was copied before: torch counts the writes to each tensor, so "constant" need not be believed."""
        for buffer, live in constants:
            content = (live.data_ptr(), live._version)
            if buffer.content != content:
                self.filled.append((buffer, content))
                self._add([buffer.host], [live])

    def _add(self, into: list[torch.Tensor], live: list[torch.Tensor]) -> None:
        if live and live[0].is_cuda:
            self.on_gpu += zip(into, live)
        else:
            self.into += into
            self.live += live

    def shares(self, count: int) -> list[slice]:
        """The tensors in host memory as `count` runs of about equal bytes."""
        ends = list(accumulate(tensor.nbytes for tensor in self.live))
        total = ends[-1] if ends else 0
        cuts = [0, *(bisect_left(ends, total * i / count) for i in range(1, count)), len(ends)]
        return [slice(start, end) for start, end in pairwise(cuts) if start < end]


def spoiled(tree: Any, name: str = "") -> str | None:
    """The place (`G.pth layers.0.weight`) of the first tensor on the host that holds NaN or infinity; None: all are numbers."""
    if isinstance(tree, torch.Tensor):
        # A sum is quicker than looking at each; large numbers may overflow it, so it only acquits.
        finite = not tree.is_floating_point() or bool(tree.sum().isfinite()) or bool(tree.isfinite().all())
        return None if finite else name
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return next((found for key, value in items if (found := spoiled(value, f"{name} {key}".strip()))), None)
