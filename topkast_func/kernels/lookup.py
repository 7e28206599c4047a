"""Rows of a matrix in CSR or BSR, put together."""

from typing import Any

import torch
from torch import Tensor

from topkast_func.kernels.inference import batched, places_of
from topkast_func.kernels.library import Gradient, define
from topkast_func.kernels.pattern import block_of
from topkast_func.kernels.soundness import check_indices
from topkast_func.places import gathered, repeated


def _compute(numbers: Tensor, values: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    height, depth = block_of(values)
    count = (rows.shape[0] - 1) * height
    check_indices(values, rows, columns, (rows.shape[0] - 1, width // depth))
    if ((numbers < 0) | (numbers >= count)).any():
        raise IndexError(f"indices must be in [0, {count}), got {numbers.unique().tolist()}")
    block, within = numbers.long() // height, numbers.long() % height
    lengths = (rows[block + 1] - rows[block]).long()
    which = repeated(lengths, int(lengths.sum()))
    first = rows[block] - (torch.cumsum(lengths, 0) - lengths)
    stored = torch.arange(which.shape[0], device=which.device) + first[which]
    lines, blocks = values.new_zeros(numbers.shape[0], width // depth, depth), values.detach()
    lines[which, columns[stored].long()] = blocks.view(-1, height, depth)[stored, within[which]]
    return lines.flatten(1)


def _fake(numbers: Tensor, values: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    return values.new_empty(numbers.shape[0], width)


class _Lookup(Gradient):
    """The rows are linear in the values; their gradient goes through the dense matrix."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.width = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        numbers, values, rows, columns = ctx.saved_tensors
        shape = (rows.shape[0] - 1) * block_of(values)[0], ctx.width
        dense = g.new_zeros(shape).index_add(0, numbers.long(), g)
        return None, None, gathered(dense, places_of(values, rows, columns, shape)), *3 * [None]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        numbers, _, *index = ctx.saved_tensors
        moved: Tensor = lookup(numbers, tangents[2], *index, ctx.width)
        return moved


lookup = define(
    "lookup(Tensor numbers, Tensor values, Tensor rows, Tensor columns, int width) -> Tensor",
    _compute,
    _fake,
    _Lookup,
    batched,
)
"""``lookup(numbers, values, crow_indices, col_indices, width)``: the rows of these numbers,
[n, width], of a matrix with values [stored] or [blocks, r, c] and int32 indices."""
