"""Work on many clips at once, a process a core."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

Result = TypeVar("Result")

# Below, other processes take longer to start than to decode.
FRAMES_WORTH_PROCESSES = 1000


def side_by_side(work: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], frames: int) -> Iterator[Result]:
    """`work(*job)` of each job, in the order in which they are finished; `frames` says how much there is to do in all.

    `work` is a function of a module, and jobs can be pickled. Raises what `work` raises, or RuntimeError where a process was killed.
    """
    processes = min(len(os.sched_getaffinity(0)), len(jobs))
    if processes < 2 or frames < FRAMES_WORTH_PROCESSES:
        yield from (work(*job) for job in jobs)
        return
    # A forked child of a process with threads (the progress bar) can hang.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise RuntimeError("a process that read clips was killed, for want of memory maybe; run the same again: finished clips stay") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A pool's processes would wait for work for ever after their parent was killed. Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
