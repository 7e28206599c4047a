"""Messages that compilation has begun, which takes seconds to minutes, and how long it took."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tqdm import tqdm

LOGGER = logging.getLogger("topkast_func")
"""Receives the messages at level INFO."""

BEGUN = "topkast_func: compiling, once for each shape of batch; this may take a minute"
ENDED = "topkast_func: compiled in {:.1f} s"


class _Watch:
    """Adds up the time of compilations; what compiles within another does not count twice."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running = self.reports = self.graphs = 0
        self.since = self.unreported = self.total = 0.0
        self.told = False

    def begin(self, *_: Any) -> None:
        with self.lock:
            self.count()
            self.graphs += 1
            if not self.told:
                self.told = True
                _tell(BEGUN)

    def count(self) -> None:
        with self.lock:
            if not self.running:
                self.since = time.perf_counter()
            self.running += 1

    def end(self, *_: Any) -> None:
        with self.lock:
            self.running -= 1
            if self.running:
                return
            spent = time.perf_counter() - self.since
            self.total += spent
            if self.told:
                self.unreported += spent
                self.report()

    def report(self) -> None:
        if self.told and not self.running and not self.reports:
            _tell(ENDED.format(self.unreported))
            self.told, self.unreported = False, 0.0


_WATCH = _Watch()

begin, end = _WATCH.begin, _WATCH.end
"""Called before and after each compilation; arguments are ignored."""


@contextmanager
def untold() -> Iterator[None]:
    """Count what takes a moment, once in a process, as compilation, without a message.

    Yields:
        Nothing.
    """
    _WATCH.count()
    try:
        yield
    finally:
        _WATCH.end()


@contextmanager
def one_report() -> Iterator[None]:
    """Report all compilations within the context in one message.

    The message is a record of the logger "topkast_func" at level INFO. Where no logging is
    configured at all, which would lose it, it goes to the standard error.

    Yields:
        Nothing.
    """
    with _WATCH.lock:
        _WATCH.reports += 1
    try:
        yield
    finally:
        with _WATCH.lock:
            _WATCH.reports -= 1
            _WATCH.report()


def graphs_begun() -> int:
    """Return how many graphs this process has begun to compile."""
    return _WATCH.graphs


def compilation_seconds() -> float:
    """Return how long this process has compiled steps so far.

    The difference of two calls is the part of the time between them that went to compiling.

    Returns:
        Seconds of wall time.
    """
    return _WATCH.total


class Times(NamedTuple):
    """Seconds of wall time.

    Attributes:
        training: All but compilation.
        compilation: What goes to compiling, which is done once.
    """

    training: float
    compilation: float

    def __str__(self) -> str:
        """Name both times."""
        return f"training {self.training:.1f} s, compilation {self.compilation:.1f} s, once"


def stopwatch() -> Callable[[], Times]:
    """Start to measure.

    Returns:
        A function that returns the times since.
    """
    start, compiled = time.perf_counter(), compilation_seconds()

    def times() -> Times:
        compilation = compilation_seconds() - compiled
        return Times(time.perf_counter() - start - compilation, compilation)

    return times


def _tell(text: str) -> None:
    disabled = LOGGER.manager.disable >= logging.INFO
    if LOGGER.level or LOGGER.hasHandlers() or disabled:
        LOGGER.info(text)
    else:
        tqdm.write(text, file=sys.stderr)
