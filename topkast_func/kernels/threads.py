"""Numba's threads, beside torch's own, other callers and forks."""

import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from numba import njit
from numba.core import event

from topkast_func import compiling
from topkast_func.kernels.tiles import VECTOR_BYTES

Kernel: TypeAlias = Callable[..., None]
"""``kernel(parts, *arguments)``: work cut into parts, which threads may share."""


def _can_cache() -> bool:
    """Return whether Numba finds a folder that it may write to."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


FAST = {"cache": _can_cache(), "nogil": True, "boundscheck": False, "error_model": "numpy"}
"""How kernels are compiled; caches between processes, where there is a place for them."""


class _Listener(event.Listener):
    """Tells when Numba compiles."""

    def on_start(self, event: Any) -> None:
        compiling.begin()

    def on_end(self, event: Any) -> None:
        compiling.end()


_EMITTED = zlib.crc32(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("simd.py", "vectors.py"))
)
"""Changes with the code that is emitted into kernels, which Numba's cache does not look at."""

_LISTENER = _Listener()
_FREE = threading.Lock()
_FORKED = threading.Event()

os.register_at_fork(after_in_child=_FORKED.set)


def compiled(kernel: Any, threaded: bool) -> Kernel:
    """Compile a kernel, for several threads that share its loop over `prange` or for one.

    Args:
        kernel: The function. It is renamed: Numba's cache tells kinds apart by name.
        threaded: Whether for several threads.

    Returns:
        The compiled kernel.
    """
    kind = "threaded" if threaded else "alone"
    kernel.__qualname__ += f"_{VECTOR_BYTES}_{kind}_{_EMITTED:x}"
    return njit(kernel, parallel=threaded, **FAST)


def in_parallel(make: Callable[[bool], Kernel], *arguments: Any) -> None:
    """Run a kernel in as many parts as torch has threads.

    One kernel at a time has the threads: Numba's pools survive neither a fork nor, some of
    them, two callers. In a fork, or beside another kernel, it runs in the caller's thread.

    Args:
        make: ``make(threaded)`` returns the kernel, compiled for several threads or for one.
        *arguments: What the kernel takes after the number of parts.
    """
    parts = torch.get_num_threads()
    with event.install_listener("numba:compile", _LISTENER):
        if parts == 1 or _FORKED.is_set() or not _FREE.acquire(blocking=False):
            make(False)(1, *arguments)
            return
        try:
            make(True)(parts, *arguments)
        finally:
            _FREE.release()
