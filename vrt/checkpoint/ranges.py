"""The bytes of a big object, in order, while several ranges of it are on their way."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

RANGE = 8 << 20
# With those that wait to be hashed and written, at most this many ranges are in memory.
AT_ONCE = 8


def in_order(read: Callable[[int, int], bytes], size: int, length: int = RANGE, at_once: int = AT_ONCE) -> Iterator[bytes]:
    """Yield the ranges of an object of `size` bytes, one after the other, read ahead by `read(start, length)` in threads.

    What `read` raises ends it; ranges that nobody waits for any more are not begun.
    """
    starts = iter(range(0, size, length))
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="range")
    ahead: deque[Future[bytes]] = deque()
    try:
        while True:
            while len(ahead) < at_once and (start := next(starts, None)) is not None:
                ahead.append(pool.submit(read, start, min(length, size - start)))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
