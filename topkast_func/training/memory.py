"""Memory that is free and that the allocator keeps, between one large tensor and the next."""

import ctypes
from collections.abc import Callable
from functools import cache

LARGE = 1 << 20
"""Bytes of tensors for which it is worth asking."""


def give_back() -> None:
    """Have the C library return what is free to the system, where it can (glibc).

    It keeps pieces of up to 32 MiB, among which the tensors of a state that begins are spread: with
    ever new ones of each size the process would grow to several times of what it holds.
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda kept: None
    return trim
