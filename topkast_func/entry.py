"""The value with which a weight newly enters A: `entry` of `topkast`."""

from collections.abc import Callable

import torch
from torch import Tensor

from topkast_func.block_masks import blocks, spread
from topkast_func.methods import Entry
from topkast_func.powerprop import theta_of
from topkast_func.ranking import magnitudes
from topkast_func.types import BlockNorm, Masks


def entered(
    name: str,
    raw: Tensor,
    old: Masks,
    new: Masks,
    entry: Entry,
    *,
    block_shape: tuple[int, int] = (1, 1),
    block_norm: BlockNorm = "l2",
    exponent: float = 1.0,
    least: Callable[[Tensor], Tensor] = torch.min,
) -> Tensor:
    """Give the entries that newly enter A their first value.

    Args:
        name: Name of the parameter, for errors.
        raw: θ, or φ of powerpropagation.
        old: The sets before the refresh.
        new: The sets after it.
        entry: How they start; "zero" is "threshold" where ``exponent`` is above 1.
        block_shape: (rows, columns) of the blocks that are chosen whole.
        block_norm: Norm by which blocks are ranked.
        exponent: a of powerpropagation; 1 where ``raw`` is θ itself.
        least: Returns the smallest entry of a tensor, of which other processes may have parts.

    Returns:
        ``raw`` with the first values of what newly enters A, every other entry as it was.
    """
    if entry == "value":
        return raw
    was, now = (sets.forward.to(raw.device) for sets in (old, new))
    came = now & ~was
    if entry == "zero" and exponent == 1.0:
        return torch.where(came, 0.0, raw)
    theta = raw if exponent == 1.0 else theta_of(raw, exponent)
    scores = magnitudes(name, theta, block_shape, block_norm).abs()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    stays = blocks(now & was, block_shape)
    threshold = least(torch.where(stays, scores, torch.inf))
    scale = torch.where(scores > threshold, threshold / scores, 1.0)
    squared = block_shape != (1, 1) and block_norm == "l2"
    scale = scale ** ((0.5 if squared else 1.0) / exponent)
    return torch.where(came, (raw * spread(scale, block_shape)).to(raw.dtype), raw)
