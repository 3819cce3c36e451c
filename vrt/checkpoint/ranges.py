"""The bytes of a big object, in order, while several ranges of it are on their way."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

RANGE = 8 << 20
AT_ONCE = 8


def in_order(fill: Callable[[int, memoryview], None], size: int, length: int = RANGE, at_once: int = AT_ONCE) -> Iterator[memoryview]:
    """Yield the ranges of an object of `size` bytes, one after the other, read ahead in threads by `fill(start, range)`.

    A range is good until the next is asked for: there are `at_once` buffers in all, used again and again.
    What `fill` raises ends it; ranges that nobody waits for any more are not begun.
    """
    starts = iter(range(0, size, length))
    free = [memoryview(bytearray(min(length, size))) for _ in range(min(at_once, -(-size // length)))]
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="range")
    ahead: deque[tuple[memoryview, memoryview, Future[None]]] = deque()
    try:
        while True:
            while free and (start := next(starts, None)) is not None:
                buffer = free.pop()
                view = buffer[: min(length, size - start)]
                ahead.append((buffer, view, pool.submit(fill, start, view)))
            if not ahead:
                return
            buffer, view, filled = ahead.popleft()
            filled.result()
            yield view
            free.append(buffer)
    finally:
        pool.shutdown(cancel_futures=True)
