"""Choice of the forward set A and the backward set B: exact counts, one ranking for both."""

import math
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from topkast_func.allocation import Allocation, allocate, check_params, select
from topkast_func.config import BlockNorm, TopKastConfig, density
from topkast_func.kernels.engines import installed
from topkast_func.types import Params

MANY = 2**16
"""Entries from which on a ranking by bits pays for the threads it takes."""


class Masks(NamedTuple):
    """The two sets of one parameter.

    Attributes:
        forward: 1_A, bool, the shape of the parameter.
        backward: 1_B, bool, the shape of the parameter; contains the forward mask.
    """

    forward: Tensor
    backward: Tensor


class NaNParameterError(ValueError):
    """A parameter holds NaN, so that its entries cannot be ranked."""


def compute_masks(params: Params, config: TopKastConfig) -> dict[str, Masks]:
    """Choose A and B of every sparse parameter from its values alone.

    Of n entries (or blocks) at sparsity s the k = max(1, floor((1 − s)·n + 1/2)) largest in
    magnitude (or block norm) are kept, ties going to the lowest flat index (Top-KAST,
    NeurIPS 2020, section 2: top-K per tensor). One ranking gives both sets, so A ⊆ B.

    Args:
        params: Weights by name, floating point of any dtype and device.
        config: Selection, sparsities and blocks.

    Returns:
        Masks by name, on the device of the parameter; dense parameters are absent.

    Raises:
        TypeError: A leaf is not a floating-point tensor.
        ValueError: A leaf is empty, a selected leaf is not divisible into blocks, or a
            pattern of the configuration does not fit the names.
        NaNParameterError: A leaf holds NaN; a ValueError too.

    Departures:
        The paper rounds D·n without saying how; ties are not discussed there.

    Example:
        >>> config = TopKastConfig(forward_sparsity=0.75, backward_sparsity=0.5)
        >>> masks = compute_masks({"weight": torch.tensor([[3.0, -1.0], [-2.0, 2.0]])}, config)
        >>> masks["weight"].forward.int().tolist(), masks["weight"].backward.int().tolist()
        ([[1, 0], [0, 0]], [[1, 0], [1, 0]])
    """
    check_params(params)
    allocations = allocate(select(params, config), config)
    for name, leaf in params.items():
        if name not in allocations and leaf.isnan().any():
            raise NaNParameterError(f"params[{name!r}] holds NaN")
    return masks_at(params, allocations, config)


def masks_at(
    params: Params, allocations: dict[str, Allocation], config: TopKastConfig
) -> dict[str, Masks]:
    """Choose A and B of the parameters that are allocated a sparsity.

    Args:
        params: Weights by name.
        allocations: Sparsities by name.
        config: Shape and norm of the blocks.

    Returns:
        Masks by name.

    Raises:
        ValueError: A parameter holds NaN or is not divisible into blocks.
    """
    masks = {}
    for name, sparsity in allocations.items():
        theta = params[name].detach()
        scores = magnitudes(name, theta, config.block_shape, config.block_norm)
        chosen = top_sets(name, scores, sparsity)
        masks[name] = Masks(*(_unblock(m, theta.shape, config.block_shape) for m in chosen))
    return masks


def kept(sparsity: float, n: int) -> int:
    """Return k, how many of ``n`` entries stay at ``sparsity``: at least one.

    Args:
        sparsity: Fraction that goes, in [0, 1).
        n: Entries there are.

    Returns:
        max(1, floor((1 − sparsity)·n + 1/2)).
    """
    return max(1, math.floor(density(sparsity) * n + 0.5))


def magnitudes(
    name: str, theta: Tensor, block_shape: tuple[int, int], block_norm: BlockNorm
) -> Tensor:
    """Return what entries or blocks are ranked by.

    Args:
        name: Name of the parameter, for errors.
        theta: The weight, [rows, columns, *positions] if there are blocks.
        block_shape: (rows, columns) of a block.
        block_norm: "l2" ranks by the sum of squares, which orders as the Euclidean norm
            does; "l1" by the sum of absolute values.

    Returns:
        The weights themselves, in float32 or float64, or block scores in float64,
        [rows / block rows, columns / block columns, *positions]; they rank by magnitude.

    Raises:
        ValueError: The first two axes are not divisible into blocks.
    """
    if block_shape == (1, 1):
        return theta if theta.dtype == torch.float64 else theta.float()
    rows, columns = block_shape
    if theta.ndim < 2 or theta.shape[0] % rows or theta.shape[1] % columns:
        raise ValueError(
            f"block_shape={block_shape} does not divide params[{name!r}] of shape "
            f"{tuple(theta.shape)}"
        )
    grid = (theta.shape[0] // rows, rows, theta.shape[1] // columns, columns)
    exponent = torch.frexp(theta.abs().max().double()).exponent.clamp(-1000, 1000)
    scaled = theta.double() * torch.pow(2.0, -exponent.double())  # exact, and no square overflows
    blocks = scaled.reshape(*grid, *theta.shape[2:])
    entries = blocks.square() if block_norm == "l2" else blocks.abs()
    return entries.sum(dim=(1, 3))


def top_sets(name: str, scores: Tensor, sparsity: Allocation) -> tuple[Tensor, Tensor]:
    """Mark the largest magnitudes at both sparsities, ties going to the lowest flat index.

    Args:
        name: Name of the parameter, for errors.
        scores: float32 or float64, any shape.
        sparsity: Forward and backward sparsity.

    Returns:
        Two bool tensors of the shape of ``scores``, the first contained in the second.

    Raises:
        NaNParameterError: A score is NaN.
    """
    scores, n = scores.contiguous(), scores.numel()
    counts = kept(sparsity.forward, n), kept(sparsity.backward, n)
    many = scores.device.type == "cpu" and n >= MANY and installed("numba")
    marks = _marked_by_bits(scores, *counts) if many else _marked_by_rank(scores.abs(), *counts)
    if marks is None:
        raise NaNParameterError(f"params[{name!r}] holds NaN; its entries cannot be ranked")
    return marks


def _marked_by_bits(scores: Tensor, forward: int, backward: int) -> tuple[Tensor, Tensor] | None:
    selection = import_module("topkast_func.kernels.selection")
    marks = selection.top_marks(scores.flatten().numpy(), forward, backward)
    return marks and tuple(torch.from_numpy(mask).view(scores.shape) for mask in marks)


def _marked_by_rank(
    magnitudes: Tensor, forward: int, backward: int
) -> tuple[Tensor, Tensor] | None:
    largest = _largest(magnitudes.flatten(), backward)
    if largest.isnan().any():
        return None
    return _mark(magnitudes, _largest(largest, forward)), _mark(magnitudes, largest)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Return the k largest of 1-D scores, NaN counting as largest, in no order."""
    if scores.device.type != "cpu":
        return scores.topk(k, sorted=False).values
    n = scores.numel()
    return torch.from_numpy(np.partition(scores.numpy(), n - k)[n - k :])


def _mark(scores: Tensor, largest: Tensor) -> Tensor:
    """Mark as many scores as there are ``largest``, dropping the last of the tied lowest."""
    threshold = largest.min()
    mask = scores >= threshold
    if excess := int(mask.count_nonzero()) - largest.numel():
        ties = (scores == threshold).flatten().nonzero().squeeze(1)
        mask.view(-1)[ties[-excess:]] = False
    return mask


def _unblock(mask: Tensor, shape: torch.Size, block_shape: tuple[int, int]) -> Tensor:
    """Spread a mask over blocks to the entries of a weight of ``shape``."""
    if block_shape == (1, 1):
        return mask
    rows, columns = block_shape
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1).view(shape)
