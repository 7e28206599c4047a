"""Sums over ranks, of all tensors of a dtype at once."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over(
    group: dist.ProcessGroup | None, share: Tensor, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Average over the ranks of a group, in one `all_reduce` for each dtype.

    m = Σ_r s_r·x_r with shares s_r that sum to 1. A rank whose share is 0 adds nothing, NaN
    neither. It can be traced; the order of what is sent does not depend on the compiler.

    Args:
        group: The group; None for all processes.
        share: s of this rank, 0-d.
        tensors: x, floating or complex, in the same order, shapes and dtypes on every rank.

    Returns:
        m, in that order, the same bits on every rank.
    """
    flat = [real(tensor).flatten() for tensor in tensors]
    found: dict[int, Tensor] = {}
    for places in by_dtype(flat):
        bucket = weighted(torch.cat([flat[place] for place in places]), share)
        dist.all_reduce(bucket, group=group)
        sums = torch.split(bucket, [flat[place].numel() for place in places])
        found |= zip(places, sums, strict=True)
    return [like(found[place], tensor) for place, tensor in enumerate(tensors)]


def by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of the tensors of each dtype."""
    found: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(place)
    return list(found.values())


def weighted(bucket: Tensor, share: Tensor) -> Tensor:
    """Return s·x, 0 where s is 0, whatever x is."""
    own = share.to(bucket.device)
    return torch.where(own > 0, bucket * own, 0.0)


def real(tensor: Tensor) -> Tensor:
    """Return a tensor, of complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def like(flat: Tensor, tensor: Tensor) -> Tensor:
    """Return a part of a bucket in a shape; one number alone must not keep the bucket."""
    if tensor.is_complex():
        return torch.complex(*flat.view(*tensor.shape, 2).unbind(-1))
    return flat.view(tensor.shape) if tensor.ndim else flat.view(()).clone()
