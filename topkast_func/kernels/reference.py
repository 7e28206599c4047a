"""Sparse products in plain torch: any device, dtype and block; slow, and easy to check."""

from typing import TypeAlias

import torch
from torch import Tensor

from topkast_func.kernels.pattern import BlockRows, Pattern, block_of, flat

Entries: TypeAlias = tuple[Tensor, Tensor]
"""Row and column of every stored entry, int64, in the shape of the values."""

PIECE = 2**24
"""Most numbers that a product holds in memory at a time, beside its operands."""


def forward(values: Tensor, x: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return x·W_Aᵀ of activations [batch, in]."""
    row, column = entries(pattern.forward, values, (features, x.shape[1]))
    return scattered(x, column, _active(values, row), row, features)


def input_gradient(values: Tensor, g: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return g·W_A of gradients [batch, out]."""
    row, column = entries(pattern.forward, values, (g.shape[1], features))
    return scattered(g, row, _active(values, row), column, features)


def weight_gradient(g: Tensor, x: Tensor, pattern: Pattern, values: Tensor) -> Tensor:
    """Return gᵀ·x sampled on B, in the order and shape of ``values``."""
    shape = (g.shape[1], x.shape[1])
    pieces = []
    for part in (pattern.forward, pattern.exploring):
        row, column = entries(part, values, shape)
        stored = (row < shape[0]).flatten()
        pairs = zip(_pieces(row % shape[0], g), _pieces(column, g), strict=True)
        dots = torch.cat([(g[:, r] * x[:, c]).sum(0) for r, c in pairs] or [g.new_zeros(0)])
        pieces.append(torch.where(stored, dots, 0.0).view(row.shape))
    return torch.cat(pieces).to(values.dtype)


def entries(part: BlockRows, values: Tensor, shape: tuple[int, int]) -> Entries:
    """Return where the entries of the stored blocks stand.

    Args:
        part: The stored blocks.
        values: Values, [blocks] or [blocks, r, c], of which the block shape is taken.
        shape: Rows and columns of the matrix.

    Returns:
        Rows and columns; the row is beyond the matrix where a place is unused.
    """
    where = flat(part, block_of(values), shape)
    return where // shape[1], where % shape[1]


def scattered(x: Tensor, of: Tensor, values: Tensor, to: Tensor, features: int) -> Tensor:
    """Return y with y[:, to] += values·x[:, of] over all entries."""
    y = x.new_zeros(x.shape[0], features)
    for v, source, target in zip(_pieces(values, x), _pieces(of, x), _pieces(to, x), strict=True):
        y.index_add_(1, target, x[:, source] * v)
    return y


def _active(values: Tensor, row: Tensor) -> Tensor:
    return values[: row.shape[0]]


def _pieces(entries: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(entries.flatten(), max(1, PIECE // max(1, x.shape[0])))
