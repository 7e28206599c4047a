"""What lies outside a set is put back, in one pass that writes only where something moved."""

from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.vectors import Tile

TOGETHER = 16
"""Entries at a time: two bytes of bits."""


def keep_within(bits: Tensor, tensor: Tensor, elsewhere: Tensor | None) -> None:
    """Leave the entries that bits mark, and put back all others.

    Args:
        bits: uint8, [⌈n/8⌉], as `packed` returns them.
        tensor: n entries, float32 or float64, contiguous, on the CPU; it is written to.
        elsewhere: What the others are to be, of the same kind; None for 0.
    """
    kernel = _kernel(elsewhere is None, tensor.dtype)
    entries = tensor.numel()
    kernel(bits, tensor, tensor if elsewhere is None else elsewhere, entries, work=entries)


@cache
def _kernel(zeros: bool, dtype: torch.dtype) -> Kernel:
    number = ir.IntType(8 * dtype.itemsize)
    numbers, marks = ir.VectorType(number, TOGETHER), ir.IntType(TOGETHER)
    marked = ir.VectorType(ir.IntType(1), TOGETHER)

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        bits: Integer,
        tensor: Integer,
        elsewhere: Integer,
        entries: Integer,
    ) -> None:
        builder = tile.builder

        def put_back(inside: ir.Value, first: Integer, kind: ir.Type) -> None:
            here = tile.at(tensor, first, kind, tile.size)
            held = tile.load(here)
            if zeros:
                other = ir.Constant(kind, None)
            else:
                other = tile.load(tile.at(elsewhere, first, kind, tile.size))
            kept = builder.select(inside, held, other)
            moved = builder.icmp_unsigned("!=", kept, held)
            if kind is numbers:
                moved = builder.icmp_unsigned("!=", builder.bitcast(moved, marks), marks(0))
            with builder.if_then(moved):
                tile.store(kept, here)

        whole = entries // TOGETHER
        with tile.loop(whole * part // parts, whole * (part + 1) // parts) as chunk:
            mask = builder.load(tile.at(bits, chunk, marks, TOGETHER // 8))
            mask.align = 1
            put_back(builder.bitcast(mask, marked), chunk * TOGETHER, numbers)
        with builder.if_then(part.equals(parts - 1)), tile.loop(whole * TOGETHER, entries) as entry:
            byte = tile.unsigned(bits, entry // 8, 1)
            put_back((byte >> entry % 8 & 1).equals(1), entry, number)

    return Kernel(emit, dtype)
