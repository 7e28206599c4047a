"""Threads that wait sleep while others use their processors, and spin again afterwards."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.problems import check_products, problem
from topkast_func.kernels import numba_cpu, waiting
from topkast_func.kernels.waiting import SHARED, Use, Waiting, are_scarce, delayed, in_use

START = Use(100.0, 50.0, 20.0)
TASKS = Path("/proc/self/task")

on_linux = pytest.mark.skipif(
    SHARED is None or not TASKS.exists(), reason="needs libgomp, and Linux, which counts use"
)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("all_", "own", "processors", "threads", "scarce"),
    [
        (2.0, 2.0, 2, 2, False),  # of this process alone
        (2.0, 1.0, 2, 2, True),  # half of it of another
        (2.0, 1.0, 2, 1, False),  # which leaves the one that is needed
        (4.0, 1.0, 4, 2, True),
        (3.0, 1.0, 4, 2, False),
        (0.2, 0.0, 2, 2, False),  # what runs on any machine
    ],
)
def test_processors_are_scarce_where_others_use_those_of_the_threads(
    all_: float, own: float, processors: int, threads: int, scarce: bool
) -> None:
    now = Use(START.time + 1, START.all + all_, START.own + own)
    assert are_scarce(START, now, processors, threads) is scarce


@on_linux
def test_use_is_counted_up() -> None:
    first = in_use()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    second = in_use()
    assert second.own - first.own >= 0.05
    assert second.all >= first.all > 0
    assert second.time > first.time


@on_linux
@pytest.mark.usefixtures("_one_thread")
def test_a_team_that_sleeps_is_there_while_processors_are_scarce(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The team makes more threads than processors, products stay right, and all of it ends."""
    uses = iter([Use(1.0, 1.0, 1.0), Use(2.0, 9.0, 1.0), Use(3.0, 17.0, 1.0), Use(4.0, 17.0, 1.0)])
    monkeypatch.setattr(waiting, "in_use", lambda: next(uses))
    monkeypatch.setattr(waiting, "delayed", itertools.count().__next__)
    kernel, watched = numba_cpu._rows_kernel((1, 1), False, torch.float32), Waiting()
    processors, before = len(os.sched_getaffinity(0)), _tasks()
    for expected in (0, 2, 2, 0):
        monkeypatch.setattr(watched, "_next", 0.0)  # time for a look
        watched.look(kernel.made(), processors)
        assert _settles_at(before + expected)
        check_products("numba", problem(), 5)


@on_linux
def test_threads_spin_where_others_compute_while_this_process_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uses = iter([Use(1.0, 1.0, 1.0), Use(2.0, 9.0, 1.0)])
    monkeypatch.setattr(waiting, "in_use", lambda: next(uses))
    monkeypatch.setattr(waiting, "delayed", lambda: 5.0)
    asleep, watched = list[bool](), Waiting()
    monkeypatch.setattr(watched, "sleep", lambda asleep_, *_: asleep.append(asleep_))
    for _ in range(2):
        monkeypatch.setattr(watched, "_next", 0.0)
        watched.look(lambda _: None, 2)
    assert asleep == [False]


@on_linux
def test_what_threads_wait_for_processors_is_counted_up() -> None:
    first, threads = delayed(), 4 * (os.cpu_count() or 1)
    code = "import time; end = time.time() + 0.3\nwhile time.time() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(threads)]
    while any(other.poll() is None for other in others):
        pass
    assert delayed() > first


def _tasks() -> int:
    return len(list(TASKS.iterdir()))


def _settles_at(number: int) -> bool:
    end = time.monotonic() + 10
    while _tasks() != number and time.monotonic() < end:
        time.sleep(0.01)
    return _tasks() == number
