"""The order among equals: by a hash of where they stand, so that they are taken evenly."""

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = TypeVar("Indices", Tensor, NDArray[np.int64])


def splitmix64(indices: Indices) -> Indices:
    """Return the first number of SplitMix64 seeded with each index, modulo 2^64.

    z = i + 0x9e3779b97f4a7c15; z = (z ⊕ z≫30)·0xbf58476d1ce4e5b9;
    z = (z ⊕ z≫27)·0x94d049bb133111eb; z ⊕ z≫31 (Steele, Lea and Flood, "Fast Splittable
    Pseudorandom Number Generators", OOPSLA 2014). Distinct indices have distinct numbers.

    Args:
        indices: int64, an array of them or one that a kernel computes.

    Returns:
        The numbers, as the int64 of the same 64 bits, in the shape of ``indices``.
    """
    z = indices + -0x61C8864680B583EB
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def tie_key(indices: Indices) -> Indices:
    """Return what entries of equal magnitude are ordered by: the smallest key comes first.

    The key of an entry (or block) is the first number of SplitMix64 seeded with its flat index
    in the whole tensor (or grid of blocks), an unsigned 64-bit integer, the same on every
    machine; no two are equal. (`kernels.largest` ranks large tensors by `splitmix64` itself, in the
    same order.)

    Args:
        indices: Flat indices, row-major from 0, int64, any shape and device.

    Returns:
        The keys less 2^63, int64, in the shape of ``indices``: their order is that of the keys.

    Raises:
        TypeError: The indices are no int64 tensor or array.

    Example:
        >>> tie_key(torch.arange(4)).argsort().tolist()
        [3, 1, 2, 0]
    """
    if getattr(indices, "dtype", None) not in (torch.int64, np.int64):
        kind = getattr(indices, "dtype", type(indices).__name__)
        raise TypeError(f"indices must be an int64 tensor or array, got {kind}")
    return splitmix64(indices) ^ -(2**63)
