"""Where masks are set, computed on their device; the host waits for counts alone, all at once."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from topkast_func.reading import readable
from topkast_func.types import Masks

PIECE = 2**17
"""Entries that are worked on at a time where all at once would take memory."""


def bands(tensor: Tensor, unit: int = 1) -> list[slice]:
    """Cut the rows of a tensor into bands of about `PIECE` entries.

    Args:
        tensor: Of at least one axis, not empty.
        unit: How many rows stay together.

    Returns:
        The bands, whole units each.
    """
    height = max(1, PIECE // (unit * tensor[0].numel())) * unit
    return [slice(start, start + height) for start in range(0, len(tensor), height)]


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
    places = torch.full((count,), mask.numel(), dtype=dtype, device="cpu")
    found = 0
    for start, piece in enumerate(torch.split(mask.flatten(), PIECE)):
        own = torch.from_numpy(np.flatnonzero(piece.numpy()))
        torch.add(own, start * PIECE, out=places[found : (found := found + own.numel())])
    return places


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


def placed(values: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a dense weight of values, zero elsewhere; autograd follows it.

    Args:
        values: Values.
        places: Where they stand in the flat weight, in their shape; the number of its entries
            where a place is unused.
        shape: Of the weight.

    Returns:
        The weight.
    """
    size = math.prod(shape)
    flat = values.new_zeros(size + 1).scatter(0, places.flatten().long(), values.flatten())
    return flat[:size].view(*shape)


def gathered(theta: Tensor, places: Tensor) -> Tensor:
    """Return the entries of θ at its flat places, in the shape of these; autograd follows it."""
    return theta.flatten().index_select(0, places.flatten()).view(places.shape)
