"""Threads for kernels, torch's own where they can be had, beside other callers and forks."""

import ctypes
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from topkast_func.kernels.waiting import SHARED, Part, Waiting

_FREE = threading.Lock()
_FORKED = threading.Event()
_WAITING = Waiting()

os.register_at_fork(after_in_child=_FORKED.set)


def in_parallel(part: Part, parts: int | None, integers: Sequence[int]) -> None:
    """Do a work in parts, in the threads of torch, or in some of Python where those are not GNU's.

    One kernel at a time has the threads: OpenMP survives no fork, and gives each caller threads
    of its own. In a fork, or beside another kernel, a kernel runs in the caller's thread.

    Args:
        part: What does it.
        parts: How many; None for as many as there are threads.
        integers: What it is given.
    """
    threads = torch.get_num_threads()
    data = (ctypes.c_int64 * (len(integers) + 2))(0, parts or threads, *integers)
    if parts == 1 or threads == 1 or _FORKED.is_set() or not _FREE.acquire(blocking=False):
        part(data)
        return
    try:
        _WAITING.look(part, threads)
        (SHARED or _by_pool)(part, data, threads, 0)
    finally:
        _FREE.release()


def _by_pool(part: Part, data: Any, threads: int, _flags: int) -> None:
    others = [_pool().submit(part, data) for _ in range(threads - 1)]
    part(data)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "topkast_func")
