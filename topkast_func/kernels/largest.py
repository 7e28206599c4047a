"""The largest of many magnitudes, to the last tie: passes over their bits, no sort, no copy.

The bits of a floating-point magnitude, read as an integer, have its order. A histogram of the
upper 16 says what they are in the smallest that is chosen; the next pass looks at the next 16,
where the upper ones are those. If more entries are as large as the smallest than are wanted, it
goes on in the same way with their ranks, the complements of the unsigned keys of `tie_key`.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from topkast_func.kernels.threads import Kernel, compiled, in_parallel
from topkast_func.tiebreak import splitmix64

Mask: TypeAlias = npt.NDArray[np.bool_]
Counts: TypeAlias = npt.NDArray[np.int64]

DIGIT = 16
"""Bits that a pass tells apart."""

_DIGIT, _LOW = np.uint64(DIGIT), np.uint64(2**DIGIT - 1)
_splitmix64: Any = njit(splitmix64)


class _Entries(NamedTuple):
    """Numbers as unsigned integers, where they stand, and what a kernel needs besides."""

    bits: Any
    places: npt.NDArray[np.int64] | None
    below_sign: np.uint64
    bounds: npt.NDArray[np.uint64]


def top_marks(
    numbers: npt.NDArray[np.floating[Any]],
    forward: int,
    backward: int,
    places: npt.NDArray[np.int64] | None = None,
) -> tuple[Mask, Mask] | None:
    """Mark the entries of largest magnitude, ties going in the order of `tie_key`.

    Args:
        numbers: 1-D, float32 or float64, contiguous.
        forward: How many to mark in the first mask, at least 1.
        backward: How many to mark in the second, at least as many.
        places: Flat index of each number in the whole tensor, int64; None where the numbers
            are all of it.

    Returns:
        The two masks; None if a number is NaN.
    """
    width = 8 * numbers.itemsize
    entries = _Entries(
        numbers.view(f"u{numbers.itemsize}"),
        places,
        np.uint64(2 ** (width - 1) - 1),
        np.linspace(0, len(numbers), torch.get_num_threads() + 1).astype(np.uint64),
    )
    counts = cache(partial(_counts, entries))
    infinite = int(np.array(np.inf, numbers.dtype).view(entries.bits.dtype))
    from_infinite_on = counts(None, width - DIGIT, 0)[infinite >> (width - DIGIT) :]
    if from_infinite_on.any() and np.isnan(numbers).any():
        return None
    first, second = (_limits(counts, width, wanted) for wanted in (forward, backward))
    return _marked(entries, *first), _marked(entries, *second)


def _limits(counts: Callable[..., Counts], width: int, wanted: int) -> tuple[int, int]:
    """Return the smallest magnitude that is marked, and the smallest rank among its equals."""
    magnitude, left, tied = _smallest(partial(counts, None), width, wanted)
    rank = 0 if left == tied else _smallest(partial(counts, magnitude), 64, left)[0]
    return magnitude, rank


def _smallest(
    counts: Callable[[int, int], Counts], width: int, wanted: int
) -> tuple[int, int, int]:
    """Return the smallest of the largest numbers, how many of it are wanted, and there are."""
    found = 0
    for shift in range(width - DIGIT, -1, -DIGIT):
        here = counts(shift, found)
        up_to = np.cumsum(here)
        digit = int(np.searchsorted(up_to, up_to[-1] - wanted, "right"))
        wanted -= int(up_to[-1] - up_to[digit])
        found = found << DIGIT | digit
        if wanted == here[digit]:  # all that begin so are in: the other bits may be 0
            break
    return found << shift, wanted, int(here[digit])


def _counts(entries: _Entries, tied: int | None, shift: int, sought: int) -> Counts:
    """Count by 16 bits, from ``shift`` on, the numbers whose bits above those are ``sought``."""
    counts = np.zeros((len(entries.bounds) - 1, 2**DIGIT), np.int64)
    magnitude = None if tied is None else np.uint64(tied)
    in_parallel(_count, *entries, magnitude, np.uint64(shift), np.uint64(sought), counts)
    return counts.sum(0)


def _marked(entries: _Entries, magnitude: int, rank: int) -> Mask:
    """Mark what is larger than a magnitude, and what is equal to it and has at least the rank."""
    mask = np.empty(len(entries.bits), np.bool_)
    in_parallel(_mark, *entries, np.uint64(magnitude), np.uint64(rank), mask)
    return mask


@lru_cache
def _count(threaded: bool) -> Kernel:
    """Return the kernel that counts magnitudes, or ranks where the magnitude is ``tied``."""

    def kernel(
        parts: int,
        bits: Any,
        places: Any,
        below_sign: Any,
        bounds: Any,
        tied: Any,
        shift: Any,
        sought: Any,
        counts: Any,
    ) -> None:
        for part in prange(len(bounds) - 1):
            for i in range(bounds[part], bounds[part + 1]):
                number = np.uint64(bits[i]) & below_sign
                if tied is not None:
                    if number != tied:
                        continue
                    number = np.uint64(~_splitmix64(np.int64(i) if places is None else places[i]))
                if number >> shift >> _DIGIT == sought:
                    counts[part, number >> shift & _LOW] += 1

    return compiled(kernel, threaded)


@lru_cache
def _mark(threaded: bool) -> Kernel:
    """Return the kernel that marks; it has no branches, so that it runs on vectors."""

    def kernel(
        parts: int,
        bits: Any,
        places: Any,
        below_sign: Any,
        bounds: Any,
        smallest: Any,
        smallest_rank: Any,
        mask: Any,
    ) -> None:
        for part in prange(len(bounds) - 1):
            for i in range(bounds[part], bounds[part + 1]):
                magnitude = np.uint64(bits[i]) & below_sign
                rank = np.uint64(~_splitmix64(np.int64(i) if places is None else places[i]))
                tied = (magnitude == smallest) & (rank >= smallest_rank)
                mask[i] = (magnitude > smallest) | tied

    return compiled(kernel, threaded)
