"""Loads, stores, loops and vectors that kernels are written in: they emit the code of LLVM."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llvmlite import ir

from topkast_func.kernels.integers import Integer, Variable, llvm_value
from topkast_func.kernels.tiles import VECTOR_BYTES

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))


class Tile:
    """Loads, stores, loops and arithmetic on vectors of one floating-point type.

    Args:
        builder: Where instructions go.
        dtype: float32 or float64.

    Attributes:
        taken: How many terms of a sum one instruction adds in a lane.
        wide: What sums are kept in: the same, but for numbers of half precision.
    """

    taken = 1

    def __init__(self, builder: ir.IRBuilder, dtype: torch.dtype) -> None:
        self.builder = builder
        self.size = dtype.itemsize
        self.scalar = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.lanes = VECTOR_BYTES // self.size
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)
        self.wide: Tile = self

    def variable(self, number: Integer | int) -> Variable:
        """Return a variable, set to a number."""
        result = Variable(self.place(_I64), self.builder)
        result.set(number)
        return result

    def integer(self, value: Any) -> Integer:
        """Return an integer: a number, or what LLVM computes."""
        return Integer(self.builder, value)

    @contextmanager
    def loop(self, start: Any, end: Any, step: Any = 1) -> Iterator[Integer]:
        """Count from start to below end.

        Yields:
            The counter.
        """
        builder, (start, end, step) = self.builder, map(llvm_value, (start, end, step))
        test, body, after = (builder.append_basic_block(name) for name in ("test", "body", "after"))
        before = builder.block
        builder.branch(test)
        builder.position_at_end(test)
        counter = builder.phi(_I64)
        counter.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", counter, end), body, after)
        builder.position_at_end(body)
        yield self.integer(counter)
        counter.add_incoming(builder.add(counter, step), builder.block)
        builder.branch(test)
        builder.position_at_end(after)

    def runs(self, start: Any, end: Integer, steps: list[int]) -> Iterator[tuple[int, Integer]]:
        """Count from start to end, in the largest step as long as it fits; the last is 1.

        Yields:
            Each step once, with the counter of its loop.
        """
        for step in steps:
            stop = end - (end - start) % step
            with self.loop(start, stop, step) as k:
                yield step, k
            start = stop

    def place(self, kind: ir.Type) -> Any:
        """Return a place for a variable; LLVM keeps it in a register where it can."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind)

    def sums(self, rows: int, columns: int) -> list[list[Any]]:
        """Return places for sums."""
        return [[self.place(self.vector) for _ in range(columns)] for _ in range(rows)]

    def at(self, base: Integer, offset: Any, kind: ir.Type, size: int) -> Any:
        """Return a pointer to ``base[offset]``, elements of ``size`` bytes."""
        first = self.builder.inttoptr(base.value, _I8.as_pointer())
        pointer = self.builder.gep(first, [llvm_value(offset * size)])
        return self.builder.bitcast(pointer, kind.as_pointer())

    def beside(self, base: Integer, offset: Any, number: int) -> list[Any]:
        """Return pointers to so many vectors side by side, the first at ``base[offset]``.

        They have one address and constant distances, which processors add up for nothing.
        """
        first = self.at(base, offset, self.vector, self.size)
        return [self.builder.gep(first, [ir.Constant(_I32, i)]) for i in range(number)]

    def number(self, base: Integer, offset: Any) -> Any:
        """Load one number, ``base[offset]``."""
        return self.builder.load(self.at(base, offset, self.scalar, self.size))

    def index(self, base: Integer, offset: Any) -> Integer:
        """Load an int32 that is not negative, ``base[offset]``."""
        return self.unsigned(base, offset, 4)

    def unsigned(self, base: Integer, offset: Any, size: int) -> Integer:
        """Load the bits of a number of so many bytes, ``base[offset]``."""
        loaded = self.builder.load(self.at(base, offset, ir.IntType(8 * size), size))
        return self.integer(self.builder.zext(loaded, _I64))

    def store_byte(self, bit: Any, base: Integer, offset: Integer) -> None:
        """Store 0 or 1 as a byte, ``base[offset]``."""
        self.builder.store(self.builder.zext(bit, _I8), self.at(base, offset, _I8, 1))

    def store_integer(self, number: Integer, base: Integer, offset: Integer, size: int) -> None:
        """Store the lowest so many bytes of an integer, ``base[offset]``."""
        kind = ir.IntType(8 * size)
        narrow = self.builder.trunc(number.value, kind) if size < 8 else number.value
        self.builder.store(narrow, self.at(base, offset, kind, size))

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

    def weight(self, values: Integer, offsets: list[Integer]) -> Any:
        """Load a weight, in every lane, for each of the terms of a sum that are taken together."""
        return self.splat(self.number(values, offsets[0]))

    def factors(self, terms: list[list[Any]]) -> list[Any]:
        """Return what weights multiply, given a line of vectors for each term."""
        return terms[0]

    def add_product(self, accumulator: Any, a: Any, b: Any) -> None:
        """Add a·b to an accumulator, rounded once."""
        name, module = f"llvm.fma.v{self.lanes}f{8 * self.size}", self.builder.module
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        fma = module.globals.get(name) or ir.Function(module, kind, name)
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
