"""How the threads of a kernel wait for each other: busily, or asleep where processors are scarce.

Threads of OpenMP spin for milliseconds before they sleep. That pays while each has a processor of
its own; where another program has that of the thread that is waited for, it makes a step tens of
times slower. libgomp's threads sleep at once while it manages more of them than there are
processors (its manual, GOMP_SPINCOUNT): a team of threads that sleep makes it so. Programs that
take turns have the processors while the others rest, and are not waited for.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Part: TypeAlias = Callable[[Any], None]
"""``part([next, parts, *integers])``: does the parts of a work that nobody has taken yet."""

SHARED: Any = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
"""Of the OpenMP library that torch itself computes with: calls a function in each thread."""

PERIOD = 0.2
"""Seconds between two looks at the processors, which are counted in hundredths of a second."""

MARGIN = 0.25
"""How many processors more than there are may be in use, before they are scarce."""

DELAY = 0.1
"""Share of the time that threads of this process have waited for a processor, together, where
others take it from them and do not only have it while they rest."""

_COUNTS, _TASKS = Path("/proc/stat"), Path("/proc/self/task")
_COUNTED = _COUNTS.exists() and Path("/proc/self/schedstat").exists()


class Use(NamedTuple):
    """Processor seconds up to now.

    Attributes:
        time: Seconds that have passed.
        all: Of all programs that do not yield to others, on the processors of this process.
        own: Of this process.
    """

    time: float
    all: float
    own: float


def in_use() -> Use:
    """Read the use of processors, on Linux (proc(5))."""
    own = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    lines = [line.split() for line in _COUNTS.read_text().splitlines()]
    busy = 0
    for user, _nice, system, _idle, _iowait, irq, softirq, steal in (
        map(int, ticks[:8]) for name, *ticks in lines if name in own
    ):
        busy += user + system + irq + softirq + steal
    return Use(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time())


def delayed() -> float:
    """Return the seconds that threads of this process have waited for a processor up to now."""
    total = 0
    for task in _TASKS.iterdir():
        with suppress(OSError):  # it has ended
            total += int((task / "schedstat").read_text().split()[1])
    return 1e-9 * total


def are_scarce(before: Use, now: Use, processors: int, threads: int) -> bool:
    """Return whether others have used what so many threads of this process would."""
    others = (now.all - before.all) - (now.own - before.own)
    return others > (processors - threads + MARGIN) * (now.time - before.time)


class Waiting:
    """Lets threads sleep while processors are scarce; one caller at a time."""

    def __init__(self) -> None:
        self._looks = SHARED is not None and _COUNTED
        self._next, self._before, self._delayed = 0.0, Use(0.0, 0.0, 0.0), 0.0
        self._released: threading.Event | None = None

    def look(self, part: Part, threads: int) -> None:
        """Decide anew how threads wait, if it is time.

        Args:
            part: Any work, which is done in no parts.
            threads: How many threads this process computes with.
        """
        if not self._looks or time.monotonic() < self._next:
            return
        now, before, delay = in_use(), self._before, delayed() - self._delayed
        self._next, self._before, self._delayed = now.time + PERIOD, now, self._delayed + delay
        processors = len(os.sched_getaffinity(0))
        time_passed = now.time - before.time
        if before.time and time_passed < 10 * PERIOD:
            waits = self._released is not None or delay > DELAY * time_passed
            asleep = waits and are_scarce(before, now, processors, threads)
            self.sleep(asleep, part, processors - threads + 2)

    def sleep(self, asleep: bool, part: Part, team: int) -> None:
        """Let threads sleep at once when they wait, or spin.

        Args:
            asleep: Whether they sleep.
            part: Any work, which is done in no parts.
            team: How many more threads make more than there are processors.
        """
        if asleep and self._released is None:
            self._released = threading.Event()
            arguments = part, max(team, 2), self._released
            threading.Thread(target=_idle, args=arguments, daemon=True).start()
        elif not asleep and self._released is not None:
            self._released.set()
            self._released = None


def _idle(part: Part, team: int, released: threading.Event) -> None:
    """Have a team of threads that do nothing until they are released: they end with this one."""
    SHARED(part, (ctypes.c_int64 * 2)(0, 0), team, 0)
    released.wait()
