"""Where masks are set, computed on their device; the host waits for counts alone, all at once."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from topkast_func.reading import readable
from topkast_func.types import Masks


def counted(masks: Sequence[Tensor]) -> list[int]:
    """Count the entries that are set, in one wait for all masks that are not on the CPU.

    Args:
        masks: bool, any shapes and devices.

    Returns:
        One number for each.
    """
    there = [mask for mask in masks if mask.device.type != "cpu"]
    sums = torch.stack([m.sum().to(there[0].device) for m in there]).cpu().tolist() if there else []
    found = iter(sums)
    return [
        int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else next(found)
        for mask in masks
    ]


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Return numbers of the host on a device, for which it does not wait.

    Args:
        numbers: On the CPU; to be written to by nobody any more.
        device: The device.

    Returns:
        Them there.
    """
    if device.type == "cuda":  # what is not pinned is copied while the host waits
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def sizes_of(sets: Mapping[str, Masks]) -> dict[str, tuple[int, int]]:
    """Return |A| and |B| by name, entries."""
    numbers = iter(counted([mask for masks in sets.values() for mask in masks]))
    return dict(zip(sets, zip(numbers, numbers, strict=True), strict=True))


def places_of(mask: Tensor, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return where a mask is set, without a wait for its device.

    Args:
        mask: bool, any shape, n entries.
        count: How many places to return, at least as many as are set.
        dtype: Of the indices.

    Returns:
        Flat indices, [count], ascending; n where there are no more.
    """
    if mask.is_meta:  # where cumsum would ask for n² entries
        return mask.new_empty(count, dtype=dtype)
    if mask.device.type != "cpu":
        numbers = torch.arange(1, count + 1, device=mask.device)
        return torch.searchsorted(mask.flatten().cumsum(0), numbers).to(dtype)
    places = torch.from_numpy(np.flatnonzero(mask.numpy())).to(dtype)
    spare = count - places.shape[0]
    return torch.cat((places, places.new_full((spare,), mask.numel()))) if spare else places


def places_apart(
    forward: Tensor,
    backward: Tensor,
    exploring: int | None = None,
    sizes: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """Return where the two disjoint sets of a weight are.

    Args:
        forward: 1_A.
        backward: 1_B, in the same shape.
        exploring: Places to keep for B∖A at the least; None for as many as it has entries.
        sizes: |A| and |B|; None to count them, for which the host waits.
        dtype: Of the indices.

    Returns:
        What `places_of` does, of A and of B∖A.
    """
    active, whole = sizes or counted((forward, backward))
    ghosts = places_of(forward ^ backward, max(whole - active, exploring or 0), dtype)
    return places_of(forward, active, dtype), ghosts


def repeated(counts: Tensor, total: int) -> Tensor:
    """Return every index of ``counts`` as often as it says, ascending.

    Args:
        counts: Integers ≥ 0, [n].
        total: Their sum.

    Returns:
        Of the dtype of the counts, [total].
    """
    traced = torch.compiler.is_compiling() or not readable(counts)
    if counts.device.type != "cpu" or traced:
        return torch.repeat_interleave(counts, output_size=total)
    numbers = counts.numpy()  # torch asks all threads for few of them too, and waits
    return torch.from_numpy(np.repeat(np.arange(len(numbers), dtype=numbers.dtype), numbers))


def order_of(numbers: Tensor) -> Tensor:
    """Return the order that sorts each row of numbers, equals staying as they are: int64."""
    if numbers.device.type != "cpu":
        return torch.sort(numbers, stable=True).indices
    return torch.from_numpy(np.argsort(numbers.numpy(), kind="stable"))  # radix, of 16 bits


def by_columns(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the order of places by columns, and where they stand in the transpose.

    Args:
        places: Flat indices into a matrix, [n], ascending.
        height: Rows of it.
        width: Columns of it.

    Returns:
        Which of the places comes when, and flat indices into the transpose, ascending; of the
        dtype of the places, [n].
    """
    column = places % width
    short = width <= 2**16  # 16 bits are sorted in linear time
    order = order_of(column.sub(2**15).short() if short else column).to(places.dtype)
    return order, column.mul_(height).add_(places // width).index_select(0, order)
