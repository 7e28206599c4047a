"""Vectors of LLVM: loads, stores, loops and arithmetic that intrinsics are built of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from topkast_func.kernels.tiles import VECTOR_BYTES

_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Tile:
    """Loads, stores and arithmetic on vectors of one floating-point type.

    Args:
        builder: Where instructions go.
        scalar: float32 or float64.
    """

    def __init__(self, builder: ir.IRBuilder, scalar: types.Float) -> None:
        self.builder = builder
        self.size = scalar.bitwidth // 8
        self.scalar = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.lanes = VECTOR_BYTES // self.size
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)

    def runs(self, start: Any, end: Any, steps: list[int]) -> Iterator[tuple[int, Any]]:
        """Count from start to end, in the largest step as long as it fits; the last is 1.

        Yields:
            Each step once, with the counter of its loop.
        """
        for step in steps:
            length = self.builder.sub(end, start)
            stop = self.builder.sub(end, self.builder.urem(length, self.constant(step)))
            stride = self.constant(step)
            with cgutils.for_range_slice(self.builder, start, stop, stride, intp=_I64) as (k, _):
                yield step, k
            start = stop

    def constant(self, number: int) -> ir.Constant:
        """Return an int64."""
        return ir.Constant(_I64, number)

    @contextmanager
    def counted(self, number: int) -> Iterator[Any]:
        """Count from 0 to below ``number``."""
        stop, one = self.constant(number), self.constant(1)
        with cgutils.for_range_slice(self.builder, self.constant(0), stop, one, intp=_I64) as (
            k,
            _,
        ):
            yield k

    def sums(self, rows: int, columns: int) -> list[list[Any]]:
        """Return places for sums, set to zero; LLVM keeps them in registers."""
        return [
            [cgutils.alloca_once_value(self.builder, self.zero) for _ in range(columns)]
            for _ in range(rows)
        ]

    def at(self, base: Any, offset: Any, kind: ir.Type, size: int) -> Any:
        """Return a pointer to ``base[offset]``, elements of ``size`` bytes."""
        address = self.builder.add(base, self.builder.mul(offset, self.constant(size)))
        return self.builder.inttoptr(address, kind.as_pointer())

    def beside(self, base: Any, offset: Any, number: int) -> list[Any]:
        """Return pointers to so many vectors side by side, the first at ``base[offset]``.

        They have one address and constant distances, which processors add up for nothing.
        """
        first = self.at(base, offset, self.vector, self.size)
        return [self.builder.gep(first, [ir.Constant(_I32, i)]) for i in range(number)]

    def number(self, base: Any, offset: Any) -> Any:
        """Load one number, ``base[offset]``."""
        return self.builder.load(self.at(base, offset, self.scalar, self.size))

    def at_2d(self, row: Any, column: Any, columns: int) -> Any:
        """Return the offset of [row, column] in a matrix."""
        return self.builder.add(self.builder.mul(row, self.constant(columns)), column)

    def index(self, base: Any, offset: Any) -> Any:
        """Load an int32, ``base[offset]``, as int64."""
        return self.builder.zext(self.builder.load(self.at(base, offset, _I32, 4)), _I64)

    def load(self, pointer: Any) -> Any:
        """Load a vector from any address."""
        loaded = self.builder.load(pointer)
        loaded.align = self.size
        return loaded

    def store(self, vector: Any, pointer: Any) -> None:
        """Store a vector at any address."""
        self.builder.store(vector, pointer).align = self.size

    def splat(self, number: Any) -> Any:
        """Return a vector of one number."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, number, ir.Constant(_I32, 0))
        return self.shuffled(one, one, [0] * self.lanes)

    def shuffled(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Return the lanes of two vectors that are asked for."""
        return self.builder.shuffle_vector(
            a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
        )

    def add_product(self, accumulator: Any, a: Any, b: Any) -> None:
        """Add a·b to an accumulator, rounded once."""
        signature = ir.FunctionType(self.vector, [self.vector] * 3)
        name = f"llvm.fma.v{self.lanes}f{8 * self.size}"
        fma = cgutils.get_or_insert_function(self.builder.module, signature, name)
        total = self.builder.call(fma, [a, b, self.builder.load(accumulator)])
        self.builder.store(total, accumulator)

    def across(self, vectors: list[Any]) -> Any:
        """Return the vector of the sums over lanes of a power of two of vectors, in order."""
        groups = 1
        while len(vectors) > 1:
            low, high = self._halves(groups, self.lanes // groups)
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self._folded(a, b, low, high) for a, b in pairs]
            groups *= 2
        total, width = vectors[0], self.lanes // groups
        while width > 1:
            low, high = ([*half] for half in self._halves(groups, width))
            total = self.builder.fadd(
                self.shuffled(total, total, low), self.shuffled(total, total, high)
            )
            width //= 2
        return total

    def transposed(self, rows: list[Any]) -> list[Any]:
        """Return the columns of a square of as many vectors as there are lanes."""
        distance = 1
        while distance < self.lanes:
            low = [j if not j & distance else j + self.lanes - distance for j in range(self.lanes)]
            high = [lane + distance for lane in low]
            turned = list(rows)
            for i in (i for i in range(self.lanes) if not i & distance):
                pair = rows[i], rows[i + distance]
                turned[i], turned[i + distance] = (self.shuffled(*pair, h) for h in (low, high))
            rows, distance = turned, 2 * distance
        return rows

    def _halves(self, groups: int, width: int) -> tuple[list[int], list[int]]:
        """Return the lanes of the first and of the second half of every group."""
        low = [g * width + i for g in range(groups) for i in range(width // 2)]
        return low, [lane + width // 2 for lane in low]

    def _folded(self, a: Any, b: Any, low: list[int], high: list[int]) -> Any:
        beyond = [self.lanes + lane for lane in low], [self.lanes + lane for lane in high]
        return self.builder.fadd(
            self.shuffled(a, b, low + beyond[0]), self.shuffled(a, b, high + beyond[1])
        )
