"""Vectors of bfloat16 for kernels: products are added two at a time, to sums in float32."""

from typing import Any

import torch
from llvmlite import ir

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.vectors import Tile

_I16, _I32 = ir.IntType(16), ir.IntType(32)

SEGMENT = 8
"""Numbers of 128 bits, within which processors interleave vectors at no cost."""


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOAT = _BFloat()


class HalfTile(Tile):
    """What `Tile` is, on vectors of bfloat16, which are taken as their bits.

    A lane of a sum adds two products at a time, those of the numbers of a pair of lanes; its
    result is rounded once, to the nearest.

    Args:
        builder: Where instructions go.
        multiplies: Whether the processor multiplies bfloat16 (AVX512_BF16); where it does not,
            float32 is multiplied.
    """

    taken = 2

    def __init__(self, builder: ir.IRBuilder, multiplies: bool) -> None:
        super().__init__(builder, torch.float32)
        self.wide = Tile(builder, torch.float32)
        self.size, self.scalar, self.lanes = 2, _I16, 2 * self.wide.lanes
        self.vector = ir.VectorType(_I16, self.lanes)
        self.zero = ir.Constant(self.vector, [0] * self.lanes)
        self._pairs = ir.VectorType(_I32, self.wide.lanes)
        self._multiplies = multiplies

    def weight(self, values: Integer, offsets: list[Integer]) -> Any:
        """Load two weights into every pair of lanes; the second is zero where there is one."""
        pair, *others = (self.builder.zext(self.number(values, at), _I32) for at in offsets)
        for other in others:
            pair = self.builder.or_(pair, self.builder.shl(other, ir.Constant(_I32, 16)))
        undefined = ir.Constant(self._pairs, ir.Undefined)
        one = self.builder.insert_element(undefined, pair, ir.Constant(_I32, 0))
        return self.shuffled(one, one, [0] * self.wide.lanes)

    def factors(self, terms: list[list[Any]]) -> list[Any]:
        """Pair the numbers of two vectors, or of one and zeros: two vectors of pairs for each."""
        first, second = terms if len(terms) > 1 else (*terms, [self.zero] * len(terms[0]))
        half = SEGMENT // 2
        starts = range(0, self.lanes, SEGMENT)
        low = [n for i in starts for j in range(i, i + half) for n in (j, j + self.lanes)]
        high = [n + half for n in low]
        pairs = zip(first, second, strict=True)
        return [self.shuffled(a, b, lanes) for a, b in pairs for lanes in (low, high)]

    def add_product(self, accumulator: Any, a: Any, b: Any) -> None:
        """Add the products of pairs to an accumulator in float32."""
        if not self._multiplies:
            for a_half, b_half in zip(self._halves_of(a), self._halves_of(b), strict=True):
                self.wide.add_product(accumulator, a_half, b_half)
            return
        kind, module = ir.VectorType(_BFLOAT, self.lanes), self.builder.module
        name = f"llvm.x86.avx512bf16.dpbf16ps.{16 * self.lanes}"
        signature = ir.FunctionType(self.wide.vector, [self.wide.vector, kind, kind])
        dot = module.globals.get(name) or ir.Function(module, signature, name)
        factors = (self.builder.bitcast(pairs, kind) for pairs in (a, b))
        total = self.builder.call(dot, [self.builder.load(accumulator), *factors])
        self.builder.store(total, accumulator)

    def rounded(self, low: Any, high: Any) -> Any:
        """Return the sums of the pairs that `factors` makes, in order, to the nearest bfloat16."""
        half = SEGMENT // 2
        starts = range(0, self.wide.lanes, half)
        lanes = [j + n for i in starts for n in (0, self.wide.lanes) for j in range(i, i + half)]
        return self.shuffled(self._nearest(low), self._nearest(high), lanes)

    def _halves_of(self, pairs: Any) -> tuple[Any, Any]:
        """Return the first and the second numbers of pairs, in float32."""
        builder, bits = self.builder, self.builder.bitcast(pairs, self._pairs)
        first = builder.shl(bits, self._all(16))
        second = builder.and_(bits, self._all(0xFFFF0000))
        return builder.bitcast(first, self.wide.vector), builder.bitcast(second, self.wide.vector)

    def _nearest(self, numbers: Any) -> Any:
        """Return a vector of float32 rounded to bfloat16, ties to even; NaN of bfloat16 stays."""
        builder, bits = self.builder, self.builder.bitcast(numbers, self._pairs)
        odd = builder.and_(builder.lshr(bits, self._all(16)), self._all(1))
        up = builder.lshr(builder.add(builder.add(bits, self._all(0x7FFF)), odd), self._all(16))
        return builder.trunc(up, ir.VectorType(_I16, self.wide.lanes))

    def _all(self, number: int) -> Any:
        """Return a vector of one integer of 32 bits."""
        return ir.Constant(self._pairs, [number] * self.wide.lanes)
