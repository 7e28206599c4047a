"""The largest of many magnitudes: three passes over their bits, no sort and no copy.

The bits of a floating-point magnitude, read as an integer, have its order. A histogram of
their upper halves finds the bin of a threshold; only the entries of that bin are ranked.
"""

from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numba import prange

from topkast_func.kernels.threads import Kernel, compiled, in_parallel

Mask: TypeAlias = npt.NDArray[np.bool_]

BINS = 2**15
"""Bins of the histogram: the upper 16 bits of a magnitude, without the sign."""


class _Bits(NamedTuple):
    """Numbers as integers, and what cuts them up; all scalars have their dtype."""

    bits: Any
    bounds: Any
    below_sign: Any
    shift: Any


def top_marks(
    numbers: npt.NDArray[np.floating[Any]], forward: int, backward: int
) -> tuple[Mask, Mask] | None:
    """Mark the entries of largest magnitude, ties going to the lowest index.

    Args:
        numbers: 1-D, float32 or float64, contiguous.
        forward: How many to mark in the first mask, at least 1.
        backward: How many to mark in the second, at least as many.

    Returns:
        The two masks; None if a number is NaN.
    """
    unsigned = np.uint32 if numbers.itemsize == 4 else np.uint64
    width = 8 * numbers.itemsize
    parts = torch.get_num_threads()
    cut = _Bits(
        numbers.view(unsigned),
        np.linspace(0, len(numbers), parts + 1).astype(np.int64),
        unsigned(2 ** (width - 1) - 1),
        unsigned(width - 16),
    )
    counts = np.zeros((parts, BINS), np.int64)
    in_parallel(_count, *cut, counts)
    infinite = np.array(np.inf, numbers.dtype).view(unsigned) >> cut.shift
    if counts[:, int(infinite) :].any() and np.isnan(numbers).any():
        return None
    (first, ties), (second, more_ties) = (_threshold(cut, counts, n) for n in (forward, backward))
    masks = np.empty((2, len(numbers)), np.bool_)
    in_parallel(_mark, *cut, first, ties, second, more_ties, *masks)
    return masks[0], masks[1]


def _threshold(
    cut: _Bits, counts: npt.NDArray[np.int64], wanted: int
) -> tuple[Any, npt.NDArray[np.int64]]:
    """Return the lowest magnitude that is marked, and how many ties at it each part marks."""
    above = np.append(np.cumsum(counts.sum(0)[::-1])[::-1], 0)
    found = int(np.count_nonzero(above >= wanted)) - 1
    rank = wanted - int(above[found + 1])
    ends = np.cumsum(counts[:, found])
    within = np.empty(ends[-1], cut.bits.dtype)
    in_parallel(_collect, *cut, cut.bits.dtype.type(found), ends - counts[:, found], within)
    threshold = np.partition(within, len(within) - rank)[len(within) - rank]
    free = rank - int(np.count_nonzero(within > threshold))
    ties = np.array([np.count_nonzero(part == threshold) for part in np.split(within, ends[:-1])])
    return threshold, np.clip(free - (np.cumsum(ties) - ties), 0, ties)


@lru_cache
def _count(threaded: bool) -> Kernel:
    """Return the kernel that counts the entries of each bin, part by part."""

    def kernel(
        parts: int, bits: Any, bounds: Any, below_sign: Any, shift: Any, counts: Any
    ) -> None:
        for part in prange(len(bounds) - 1):
            for i in range(bounds[part], bounds[part + 1]):
                counts[part, (bits[i] & below_sign) >> shift] += 1

    return compiled(kernel, threaded)


@lru_cache
def _collect(threaded: bool) -> Kernel:
    """Return the kernel that collects the magnitudes of a bin, in order."""

    def kernel(
        parts: int,
        bits: Any,
        bounds: Any,
        below_sign: Any,
        shift: Any,
        sought: Any,
        starts: Any,
        within: Any,
    ) -> None:
        for part in prange(len(bounds) - 1):
            to = starts[part]
            for i in range(bounds[part], bounds[part + 1]):
                magnitude = bits[i] & below_sign
                if magnitude >> shift == sought:
                    within[to] = magnitude
                    to += 1

    return compiled(kernel, threaded)


@lru_cache
def _mark(threaded: bool) -> Kernel:
    """Return the kernel that marks what is above two thresholds, and some ties at them."""

    def kernel(
        parts: int,
        bits: Any,
        bounds: Any,
        below_sign: Any,
        shift: Any,
        first: Any,
        ties: Any,
        second: Any,
        more_ties: Any,
        mask: Any,
        larger_mask: Any,
    ) -> None:
        for part in prange(len(bounds) - 1):
            left, more_left = ties[part], more_ties[part]
            for i in range(bounds[part], bounds[part + 1]):
                magnitude = bits[i] & below_sign
                mask[i] = magnitude > first
                larger_mask[i] = magnitude > second
                if magnitude == first and left > 0:
                    mask[i] = True
                    left -= 1
                if magnitude == second and more_left > 0:
                    larger_mask[i] = True
                    more_left -= 1

    return compiled(kernel, threaded)
