"""Rows of a matrix in CSR or BSR, put together."""

import torch
from torch import Tensor

from topkast_func.kernels.inference import batched
from topkast_func.kernels.library import define
from topkast_func.kernels.pattern import block_of
from topkast_func.kernels.soundness import check_indices
from topkast_func.places import repeated


def _compute(numbers: Tensor, values: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    height, depth = block_of(values)
    count = (rows.shape[0] - 1) * height
    check_indices(rows, columns, rows.shape[0] - 1, width // depth)
    if ((numbers < 0) | (numbers >= count)).any():
        raise IndexError(f"indices must be in [0, {count}), got {numbers.unique().tolist()}")
    block, within = numbers.long() // height, numbers.long() % height
    lengths = (rows[block + 1] - rows[block]).long()
    which = repeated(lengths, int(lengths.sum()))
    first = rows[block] - (torch.cumsum(lengths, 0) - lengths)
    stored = torch.arange(which.shape[0], device=which.device) + first[which]
    lines = values.new_zeros(numbers.shape[0], width // depth, depth)
    lines[which, columns[stored].long()] = values.view(-1, height, depth)[stored, within[which]]
    return lines.flatten(1)


def _fake(numbers: Tensor, values: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    return values.new_empty(numbers.shape[0], width)


lookup = define(
    "lookup(Tensor numbers, Tensor values, Tensor rows, Tensor columns, int width) -> Tensor",
    _compute,
    _fake,
    batched=batched,
)
"""``lookup(numbers, values, crow_indices, col_indices, width)``: the rows of these numbers,
[n, width], of a matrix with values [stored] or [blocks, r, c] and int32 indices."""
