"""Rankings by magnitude: exact counts, ties in the order of a hash, entries or blocks.

The count of `top_sets` is exact in all of a tensor, or in each group of N:M; ``…_among`` takes
from a set, wherever its entries stand.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from topkast_func.elsewhere import Elsewhere
from topkast_func.groups import grouped, ungrouped
from topkast_func.kernels.engines import installed
from topkast_func.places import bands, order_of
from topkast_func.sparsity import density
from topkast_func.tiebreak import tie_key
from topkast_func.types import BlockNorm

Sets: TypeAlias = tuple[Tensor, Tensor]
"""1_A and 1_B over entries, or over blocks."""

MANY = 2**16
"""Entries from which on a ranking by bits is worth its threads."""

RANKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that are ranked as they are."""

NO_RANKING = (
    "params[{!r}] holds NaN; its entries cannot be ranked. Where training made it: layers that "
    "normalise rows or columns divide by zero where A leaves one empty, and summary counts those"
)

NO_GRADIENT = (
    "the gradient of {!r} is not finite, as in a step that a torch.amp.GradScaler leaves out; "
    "entries cannot be ranked by it"
)

Top: TypeAlias = Callable[[str, Tensor, Tensor | None, int, int], Sets]

_ELSEWHERE: Elsewhere[Top] = Elsewhere()
"""How to rank the tensor of which this process has a part; see `_top`."""


def ranked_by(top: Top) -> AbstractContextManager[None]:
    """Let `top_sets` and `largest_among` take from all parts of a tensor, in this thread.

    Args:
        top: ``top(name, scores, places, forward, backward)``: marks the largest of 1-D scores,
            which stand at ``places`` of the flat part, or are all of it.

    Returns:
        The time in which they do.
    """
    return _ELSEWHERE.by(top)


class NaNParameterError(ValueError):
    """A parameter holds NaN, or its gradient an infinite number too, by which it is ranked."""


def kept(sparsity: float, n: int, group: int | None = None) -> int:
    """Return k, how many of ``n`` entries stay at ``sparsity``: at least one of each group.

    Args:
        sparsity: Fraction that goes, in [0, 1).
        n: Entries there are.
        group: M, entries of a group, which divides n; None where all are one group, of n.

    Returns:
        max(1, floor((1 − sparsity)·M + 1/2)), in double precision, for each of the n / M groups.
    """
    size = group or n
    return max(1, math.floor(density(sparsity) * size + 0.5)) * (n // size)


def magnitudes(
    name: str, theta: Tensor, block_shape: tuple[int, int], block_norm: BlockNorm
) -> Tensor:
    """Return what entries or blocks are ranked by.

    Args:
        name: Name of the parameter, for errors.
        theta: The weight, [rows, columns, *positions] if there are blocks, which divide it.
        block_shape: (rows, columns) of a block.
        block_norm: "l2" ranks by the sum of squares, which orders as the Euclidean norm
            does; "l1" by the sum of absolute values.

    Returns:
        The weights themselves, in float16, bfloat16, float32 or float64, or block scores in
        float64, [rows / block rows, columns / block columns, *positions]; they rank by magnitude.
    """
    if block_shape == (1, 1):
        return theta if theta.dtype in RANKED else theta.float()
    rows, columns = block_shape
    largest = torch.linalg.vector_norm(theta, torch.inf).double()
    scale = torch.pow(2.0, -torch.frexp(largest).exponent.clamp(-1000, 1000).double())  # exact
    grid = (theta.shape[0] // rows, theta.shape[1] // columns, *theta.shape[2:])
    found = theta.new_empty(grid, dtype=torch.float64)
    for band in bands(theta, rows):  # scaled, so that no square overflows
        scaled = (theta[band].double() * scale).reshape(-1, rows, grid[1], columns, *grid[2:])
        entries = scaled.square() if block_norm == "l2" else scaled.abs()
        found[band.start // rows : band.stop // rows] = entries.sum(dim=(1, 3))
    return found


def top_sets(
    name: str, scores: Tensor, forward: int, backward: int, group: int | None = None
) -> Sets:
    """Mark the largest magnitudes, as many in each group, ties going in the order of `tie_key`.

    The host does not wait for a device: on one, where a score is NaN, too few are marked.

    Args:
        name: Name of the parameter, for errors.
        scores: Of a dtype of `RANKED`, any shape; in groups of any.
        forward: How many to mark first, at least 1.
        backward: How many to mark second, at least as many.
        group: M, see `grouped`; None where all are one group.

    Returns:
        Two bool tensors of the shape of ``scores``, the first contained in the second.

    Raises:
        NaNParameterError: A score on the CPU is NaN.
    """
    groups = 1 if group is None else scores.numel() // group
    if group is None or groups == 1:
        first, second = _top(name, scores.flatten(), None, forward, backward)
        return first.view(scores.shape), second.view(scores.shape)
    if scores.device.type == "cpu" and scores.isnan().any():
        raise NaNParameterError(NO_RANKING.format(name))
    return _top_of_groups(scores, forward // groups, backward // groups, group)


def largest_among(name: str, candidates: Tensor, scores: Tensor, count: int) -> Tensor:
    """Mark the candidates of largest magnitude, wherever they stand, ties as in `top_sets`.

    Args:
        name: Name of the parameter, for errors.
        candidates: bool; at least ``count`` of them are set.
        scores: Of a dtype of `RANKED`, of the same shape.
        count: How many to mark, at least 0.

    Returns:
        bool, of the same shape.

    Raises:
        NaNParameterError: The score of a candidate on the CPU is NaN.
    """
    if scores.device.type != "cpu" and _ELSEWHERE.taken is None:
        among = torch.where(candidates, scores.abs(), -1.0).flatten()
        return _top_in_order(among, _keys(among), count, count)[0].view(candidates.shape)
    marked = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    if count:
        places = candidates.flatten().nonzero().squeeze(1)
        marked[places] = _top(name, scores.flatten()[places], places, count, count)[0]
    return marked.view(candidates.shape)


def _top(name: str, scores: Tensor, places: Tensor | None, forward: int, backward: int) -> Sets:
    """Mark the largest of 1-D scores, which stand at ``places`` (all of them at None)."""
    if (top := _ELSEWHERE.taken) is not None:
        return top(name, scores, places, forward, backward)
    if scores.device.type != "cpu":
        return _top_in_order(scores.abs(), _keys(scores), forward, backward)
    many = scores.numel() >= MANY and installed("numba")
    marks = (top_by_bits if many else _top_by_values)(scores, places, forward, backward)
    if marks is None:
        raise NaNParameterError(NO_RANKING.format(name))
    return marks


def _keys(scores: Tensor, first: int = 0) -> Tensor:
    """Return the tie keys of entries of a tensor, from the flat index ``first`` on, in a row."""
    end = first + scores.numel()
    return tie_key(torch.arange(first, end, device=scores.device)).view(scores.shape)


def _top_of_groups(scores: Tensor, forward: int, backward: int, group: int) -> Sets:
    """Mark the largest of each group, band by band."""
    first, second = (torch.empty_like(scores, dtype=torch.bool) for _ in range(2))
    for band in bands(scores):
        own = scores[band]
        keys = grouped(_keys(own, band.start * own[0].numel()), group)
        marks = _top_in_order(grouped(own.abs(), group), keys, forward, backward)
        first[band], second[band] = (ungrouped(mark, own.shape, group) for mark in marks)
    return first, second


def _top_in_order(magnitudes: Tensor, keys: Tensor, forward: int, backward: int) -> Sets:
    """Mark the largest of each row of magnitudes by sorting it, first by its tie keys."""
    order = order_of(keys)
    by_key = magnitudes.gather(-1, order)
    ranked = order.gather(-1, by_key.sort(descending=True, stable=True).indices)
    blank = torch.zeros_like(magnitudes, dtype=torch.bool)
    whole = ~magnitudes.isnan().any()
    first, second = (blank.scatter(-1, ranked[..., :k], True) & whole for k in (forward, backward))
    return first, second


def top_by_bits(
    scores: Tensor, places: Tensor | None, forward: int, backward: int, **range_of: Any
) -> Sets | None:
    """Mark the largest of scores on the CPU, or of a range of them; see `top_marks`."""
    largest = import_module("topkast_func.kernels.largest")
    where = None if places is None else places.numpy()
    scores = scores.resolve_neg()  # which numpy does not
    if scores.dtype == torch.bfloat16:  # which numpy lacks
        scores, range_of["infinite"] = scores.view(torch.int16), 0x7F80
    marks = largest.top_marks(scores.numpy(), forward, backward, where, **range_of)
    return marks and tuple(map(torch.from_numpy, marks))


def _top_by_values(
    scores: Tensor, places: Tensor | None, forward: int, backward: int
) -> Sets | None:
    magnitudes = scores.abs()
    if scores.dtype == torch.bfloat16:  # which numpy lacks
        magnitudes = magnitudes.float()
    largest = _largest(magnitudes, backward)
    if largest.isnan().any():
        return None
    return (
        _mark(magnitudes, places, _largest(largest, forward)),
        _mark(magnitudes, places, largest),
    )


def _largest(numbers: Tensor, k: int) -> Tensor:
    """Return the k largest of 1-D numbers on the CPU, NaN counting as largest, in no order."""
    n = numbers.numel()
    return torch.from_numpy(np.partition(numbers.numpy(), n - k)[n - k :])


def _mark(magnitudes: Tensor, places: Tensor | None, largest: Tensor) -> Tensor:
    """Mark as many magnitudes as there are ``largest``, dropping the last of the tied lowest."""
    threshold = largest.min()
    mask = magnitudes >= threshold
    if excess := int(mask.count_nonzero()) - largest.numel():
        tied = (magnitudes == threshold).nonzero().squeeze(1)
        keys = tie_key(tied if places is None else places[tied])
        mask[tied[keys >= _largest(keys, excess).min()]] = False
    return mask
