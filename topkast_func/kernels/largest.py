"""The largest of many magnitudes, to the last tie: passes over their bits, no sort, no copy.

The bits of a floating-point magnitude, read as an integer, have its order. A histogram of the
upper 16 says what they are in the smallest that is chosen; the next pass looks at the next 16,
where the upper ones are those. If more entries are as large as the smallest than are wanted, it
goes on in the same way with their ranks, the complements of the unsigned keys of `tie_key`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.vectors import Tile
from topkast_func.tiebreak import splitmix64

Mask: TypeAlias = npt.NDArray[np.bool_]
Counts: TypeAlias = npt.NDArray[np.int64]

DIGIT = 16
"""Bits that a pass tells apart."""

_splitmix64: Any = splitmix64
_DTYPES = {16: torch.float16, 32: torch.float32, 64: torch.float64}


class _Entries(NamedTuple):
    """Numbers, where they stand, if that is not everywhere, and where their range begins."""

    numbers: npt.NDArray[Any]
    places: npt.NDArray[np.int64] | None
    first: int

    def addresses(self) -> tuple[int, int, int, int]:
        """Return what `_entries` takes."""
        places = self.numbers if self.places is None else self.places
        return self.numbers.ctypes.data, places.ctypes.data, self.first, len(self.numbers)


def top_marks(
    numbers: npt.NDArray[Any],
    forward: int,
    backward: int,
    places: npt.NDArray[np.int64] | None = None,
    first: int = 0,
    total: Callable[[Counts], Counts] = lambda counts: counts,
    infinite: int | None = None,
) -> tuple[Mask, Mask] | None:
    """Mark the entries of largest magnitude, ties going in the order of `tie_key`.

    Args:
        numbers: 1-D, floating point: a tensor, or a range of it; the bits of a format that numpy
            lacks.
        forward: How many to mark in the first mask, at least 1, in all ranges.
        backward: How many to mark in the second, at least as many.
        places: Where the numbers stand in the range, int64; None where they are all of it.
        first: Flat index of the first entry of the range in the tensor.
        total: Adds to counts those of the other ranges, wherever these are.
        infinite: The bits of infinity, where ``numbers`` are bits.

    Returns:
        The two masks; None if a number of any range is NaN.
    """
    width, numbers = 8 * numbers.itemsize, np.ascontiguousarray(numbers)
    places = None if places is None else np.ascontiguousarray(places)
    entries = _Entries(numbers, places, first)
    counts = cache(lambda tied, shift, sought: total(_counts(entries, tied, shift, sought)))
    bits = numbers.view(f"u{numbers.itemsize}")
    if infinite is None:
        infinite = int(np.array(np.inf, numbers.dtype).view(bits.dtype))
    from_infinite_on = counts(None, width - DIGIT, 0)[infinite >> (width - DIGIT) :]
    if from_infinite_on.any():
        nan = bits & bits.dtype.type(2 ** (width - 1) - 1) > infinite
        if total(nan.sum(keepdims=True)).any():
            return None
    limits = [_limits(counts, width, wanted) for wanted in (forward, backward)]
    return _marked(entries, *limits[0]), _marked(entries, *limits[1])


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
    counts = np.zeros((torch.get_num_threads(), 2**DIGIT), np.int64)
    kernel = _count_kernel(*_kind(entries), tied is not None)
    kernel(*entries.addresses(), tied or 0, shift, sought, counts.ctypes.data, parts=len(counts))
    return counts.sum(0)


def _marked(entries: _Entries, magnitude: int, rank: int) -> Mask:
    """Mark what is larger than a magnitude, and what is equal to it and has at least the rank."""
    mask = np.empty(len(entries.numbers), np.bool_)
    _mark_kernel(*_kind(entries))(*entries.addresses(), magnitude, rank, mask.ctypes.data)
    return mask


def _kind(entries: _Entries) -> tuple[torch.dtype, bool]:
    return _DTYPES[8 * entries.numbers.itemsize], entries.places is not None


@cache
def _count_kernel(dtype: torch.dtype, placed: bool, ranks: bool) -> Kernel:
    """Return the kernel that counts magnitudes, or the ranks where the magnitude is ``tied``."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        numbers: Integer,
        places: Integer,
        first: Integer,
        length: Integer,
        tied: Integer,
        shift: Integer,
        sought: Integer,
        counts: Integer,
    ) -> None:
        here = counts + part * (8 * 2**DIGIT)
        own = numbers, places if placed else None, first, length
        with _entries(tile, *own, part, parts) as entry:
            _, magnitude, rank = entry
            number = rank if ranks else magnitude
            begins = number.above_bits(shift).above_bits(DIGIT).equals(sought)
            if ranks:
                begins = tile.builder.and_(begins, magnitude.equals(tied))
            with tile.builder.if_then(begins):
                digit = number.above_bits(shift) & (2**DIGIT - 1)
                count = tile.unsigned(here, digit, 8) + 1
                tile.builder.store(count.value, tile.at(here, digit, count.value.type, 8))

    return Kernel(emit, dtype)


@cache
def _mark_kernel(dtype: torch.dtype, placed: bool) -> Kernel:
    """Return the kernel that marks; it has no branches, so that it runs on vectors."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        numbers: Integer,
        places: Integer,
        first: Integer,
        length: Integer,
        smallest: Integer,
        smallest_rank: Integer,
        mask: Integer,
    ) -> None:
        own = numbers, places if placed else None, first, length
        with _entries(tile, *own, part, parts) as entry:
            i, magnitude, rank = entry
            below = magnitude.below(smallest)
            tied = magnitude.equals(smallest)
            low = tile.builder.and_(tied, rank.below(smallest_rank))
            marked = tile.builder.not_(tile.builder.or_(below, low))
            tile.store_byte(marked, mask, i)

    return Kernel(emit, dtype)


@contextmanager
def _entries(
    tile: Tile,
    numbers: Integer,
    places: Integer | None,
    first: Integer,
    length: Integer,
    part: Integer,
    parts: Integer,
) -> Iterator[tuple[Integer, Integer, Integer]]:
    """Emit a loop over the entries of a part: which it is, its magnitude's bits, and its rank."""
    with tile.loop(length * part // parts, length * (part + 1) // parts) as i:
        magnitude = tile.unsigned(numbers, i, tile.size) & (2 ** (8 * tile.size - 1) - 1)
        place = i if places is None else tile.unsigned(places, i, 8)
        yield i, magnitude, _splitmix64(place + first) ^ -1
