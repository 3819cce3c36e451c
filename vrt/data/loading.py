"""Batches for the trainer, made by it or by processes beside it; neither their number nor a restart changes one."""

import ctypes
import os
from collections.abc import Iterator
from multiprocessing.sharedctypes import SynchronizedArray

import torch
from torch.utils.data import DataLoader, get_worker_info

from vrt.data.clips import PreparedData
from vrt.data.errors import DataError
from vrt.data.sampler import ALL, Batch, Reads, Share, check_sampling, training_batch
from vrt.observe import log
from vrt.params import Params

# Long enough for step, sample and clip.
LONGEST_NOTE = 400


def training_batches(data: PreparedData, params: Params, first_step: int, last_step: int, share: Share = ALL) -> Iterator[tuple[int, Batch]]:
    """(step, `share` of its batch) for each step from `first_step` to `last_step`, both included, made by params.data.workers processes.

    Raises DataError: at once where clips are too small, later where a clip can't be read (it names step and clip).
    If a worker is killed, torch raises a RuntimeError, wherever the trainer is then; what the worker read is logged when the batches are closed.
    """
    check_sampling(data, params)
    steps = range(first_step, last_step + 1)
    if params.data.workers == 0:
        return ((step, training_batch(data, params, step, share)) for step in steps)
    return _batches_from_workers(data, params, steps, share)


class _Steps:
    """The data set that a DataLoader sees: indexed by step."""

    def __init__(self, data: PreparedData, params: Params, share: Share, notes: list[SynchronizedArray]):
        self._data, self._params, self._share, self._notes = data, params, share, notes

    def __getitem__(self, step: int) -> tuple[int, Batch | DataError]:
        reads = _NotedReads(self._notes[get_worker_info().id])
        try:
            batch = training_batch(self._data, self._params, step, self._share, reads)
        except DataError as error:
            # Raised here, it would reach the user inside a page of torch's traceback.
            return step, error
        reads.begin("")
        return step, batch


class _NotedReads(Reads):
    """Keeps what is being read where the trainer still finds it after this process was killed."""

    def __init__(self, note: SynchronizedArray):
        super().__init__()
        self._note = note

    def begin(self, what: str) -> None:
        self._note.value = what.encode()[: LONGEST_NOTE - 1]


def _batches_from_workers(data: PreparedData, params: Params, steps: range, share: Share) -> Iterator[tuple[int, Batch]]:
    # A forked child of a process with threads (the checkpoint writer) can hang.
    processes = torch.multiprocessing.get_context("spawn")
    notes = [processes.Array(ctypes.c_char, LONGEST_NOTE) for _ in range(params.data.workers)]
    loader = DataLoader(
        _Steps(data, params, share, notes),
        batch_size=None,
        sampler=steps,
        num_workers=params.data.workers,
        prefetch_factor=2,
        worker_init_fn=_leave_process_group,
        multiprocessing_context=processes,
        # The loader draws a seed that nothing uses; not from the trainer's generator.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    try:
        for step, batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield step, batch
    finally:
        _name_the_dead(batches._workers, notes)
        # Left to the garbage collector, workers would live for as long as the traceback of an error.
        batches._shutdown_workers()


def _name_the_dead(workers: list[torch.multiprocessing.Process], notes: list[SynchronizedArray]) -> None:
    for worker, note in zip(workers, notes):
        if worker.exitcode:
            what = note.value.decode() or "it had nothing to read"
            how = f"was killed by signal {-worker.exitcode}" if worker.exitcode < 0 else f"ended with exit code {worker.exitcode}"
            log.error(
                "loader process %d %s while it read: %s; out of memory, or a damaged clip? `vrt data check` reads all of them", worker.pid, how, what
            )


def _leave_process_group(_worker: int) -> None:
    # A signal to the whole group asks the trainer to finish its step and save, which it can't do without its workers.
    # They end with it all the same: it tells them to, and they watch whether it lives.
    os.setpgrp()
