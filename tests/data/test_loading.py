"""Loader processes change no batch, and their end is explained."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal

import pytest
import torch

from vrt.data.clips import DataError, PreparedData
from vrt.data.loading import training_batches
from vrt.data.sampler import Batch, Share

SMALL = {"train.crop": 16, "train.frames": 4, "train.batch_size": 2}


def same(one: Batch, two: Batch) -> bool:
    return torch.equal(one.degraded, two.degraded) and torch.equal(one.truth, two.truth)


def test_a_restart_in_between_sees_the_same_batches(coordinates: PreparedData, make_params):
    params = make_params(SMALL)
    whole = list(training_batches(coordinates, params, 1, 6))
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    resumed = list(training_batches(coordinates, params, 4, 6))
    assert all(one[0] == two[0] and same(one[1], two[1]) for one, two in zip(whole[3:], resumed, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_very_batches_that_one_has(world: int, coordinates: PreparedData, make_params):
    params = make_params({**SMALL, "train.batch_size": 4, "data.workers": 0})
    whole = list(training_batches(coordinates, params, 3, 5))
    shares = [list(training_batches(coordinates, params, 3, 5, Share(rank, world))) for rank in range(world)]
    for number, (step, batch) in enumerate(whole):
        parts = [share[number] for share in shares]
        assert {part[0] for part in parts} == {step} and {len(part[1].truth) for part in parts} == {4 // world}
        assert same(Batch(*(torch.cat([getattr(part, name) for _, part in parts]) for name in ("degraded", "truth"))), batch)


def test_a_batch_that_can_not_be_shared_is_refused(coordinates: PreparedData, make_params):
    with pytest.raises(ValueError, match="train.batch_size 2: expected a multiple of the 3 processes that share it; choose a number of processes"):
        next(training_batches(coordinates, make_params(SMALL), 1, 2, Share(0, 3)))


def test_workers_change_nothing(coordinates: PreparedData, make_params):
    alone = list(training_batches(coordinates, make_params(SMALL), 3, 12))
    state = torch.get_rng_state()
    helped = training_batches(coordinates, make_params({**SMALL, "data.workers": 2}), 3, 12)
    first = [next(helped), next(helped)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    groups = {os.getpgid(worker.pid) for worker in workers}
    assert os.getpgid(0) not in groups, "a signal to the trainer's group reaches its workers"
    assert all(one[0] == two[0] and same(one[1], two[1]) for one, two in zip(alone, [*first, *helped], strict=True))
    assert torch.equal(torch.get_rng_state(), state), "the trainer's own random numbers were used"


def test_a_worker_that_can_t_read_names_step_and_clip_alone_and_ends(coordinates: PreparedData, make_params):
    for clip in coordinates.clips("train"):
        os.truncate(coordinates.root / clip.file, 200)
    batches = training_batches(coordinates, make_params({**SMALL, "data.workers": 1}), 5, 8)
    with pytest.raises(DataError, match=r"^step 5, sample 0, clip train/[ab] \(\d frames of \d+x\d+\): .*train/[ab].b2nd: expected SHA-256"):
        next(batches)
    assert multiprocessing.active_children() == []


def test_ending_early_ends_the_workers(coordinates: PreparedData, make_params, caplog):
    batches = training_batches(coordinates, make_params({**SMALL, "data.workers": 1}), 1, 1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert multiprocessing.active_children() == []
    assert caplog.records == []


def test_a_killed_worker_is_named_with_the_clip_it_read(coordinates: PreparedData, make_params, caplog):
    pipes = [coordinates.root / clip.file for clip in coordinates.clips("train")]
    for pipe in pipes:
        # Who reads it waits for somebody to write.
        pipe.unlink()
        os.mkfifo(pipe)

    def kill_who_reads(*_: object) -> None:
        for pipe in pipes:
            # Without a reader it can't be opened.
            with contextlib.suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, kill_who_reads)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        with caplog.at_level(logging.ERROR, "vrt"), pytest.raises(RuntimeError, match="worker"):
            list(training_batches(coordinates, make_params({**SMALL, "data.workers": 1}), 7, 8))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (said,) = [record.message for record in caplog.records]
    assert re.fullmatch(
        r"loader process \d+ was killed by signal 9 while it read: step 7, sample 0, clip train/[ab] \(\d frames of \d+x\d+\); "
        r"out of memory, or a damaged clip\? `vrt data check` reads all of them",
        said,
    )
