"""What a person sees of a running command: log lines and progress, on a terminal or in a file."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("vrt")

_console = Console(stderr=True)


def set_up_logging(rank: int = 0) -> None:
    """Send the `vrt` log to stderr: coloured on a terminal, plain timestamped lines elsewhere.

    Of the processes that train together only the one of rank 0 tells how it goes; the others speak up when something is wrong.
    """
    if log.handlers:
        return
    if _console.is_terminal:
        handler: logging.Handler = _TerminalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {f'rank {rank}: ' if rank else ''}%(message)s", datefmt="%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.WARNING if rank else logging.INFO)
    log.propagate = False


class _TerminalHandler(logging.Handler):
    """Prints above a running progress bar, and leaves long lines to the terminal: a wrapped address can't be clicked."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else None
        try:
            _console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            # The terminal was closed. Who works on must not end by what it says.
            self.handleError(record)


class Bar:
    """Progress of one task. `advance` moves it and shows `fields` (such as clip="tree") beside it."""

    # Lines in a log file are for reading later: one in this many seconds is enough.
    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, title: str, total: int, unit: str, done: int, live: Progress | None):
        self._title, self._total, self._unit, self._live = title, total, unit, live
        self._done = self._first = done
        self._started = self._printed = time.monotonic()
        self._task = live.add_task(title, total=total, completed=done, fields="") if live else None

    def advance(self, count: int = 1, **fields: object) -> None:
        """Count that many units more as done."""
        self._done += count
        text = "  ".join(f"{key} {value}" for key, value in fields.items())
        if self._live:
            self._live.update(self._task, advance=count, fields=text)
        elif time.monotonic() - self._printed >= self.SECONDS_BETWEEN_LINES or self._ends_a_long_task():
            self._printed = time.monotonic()
            log.info("%s %d/%d %s%s%s", self._title, self._done, self._total, self._unit, f"  {text}" if text else "", self._left())

    def _ends_a_long_task(self) -> bool:
        return self._done == self._total and time.monotonic() - self._started >= self.SECONDS_BETWEEN_LINES

    def _left(self) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)
        if self._done >= self._total or not rate:
            return ""
        minutes, seconds = divmod(round((self._total - self._done) / rate), 60)
        return f"  left {minutes // 60}:{minutes % 60:02}:{seconds:02}"


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """Show progress over `total` units, `done` of which were done before; a bar on a terminal, plain lines elsewhere."""
    if not _console.is_terminal or not log.isEnabledFor(logging.INFO):
        yield Bar(title, total, unit, done, None)
        return
    # Fits 80 columns with a training's fields beside it.
    columns = (TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[fields]}"))
    live = Progress(*columns, console=_console)
    live.start()
    try:
        yield Bar(title, total, unit, done, live)
    finally:
        # It draws once more: not on a terminal that was closed.
        with suppress(OSError):
            live.stop()


def without_credentials(address: str) -> str:
    """An address without the user and password that it may hold."""
    parts = urlsplit(address)
    if not parts.hostname or "@" not in parts.netloc:
        return address
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
