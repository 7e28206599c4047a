"""Integers of kernels: arithmetic with them emits the code of LLVM."""

from functools import partialmethod
from typing import Any

from llvmlite import ir

_I64 = ir.IntType(64)


class Integer:
    """An int64 that a kernel computes; arithmetic with it emits code, and wraps around.

    Division and comparison are those of unsigned integers, shifts those of signed ones.

    Args:
        builder: Where instructions go.
        value: A number, or an int64 of LLVM.
    """

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder = builder
        self.value = ir.Constant(_I64, value) if isinstance(value, int) else value

    def _with(self, instruction: str, other: "Integer | int") -> "Integer":
        emit = getattr(self.builder, instruction)
        return Integer(self.builder, emit(self.value, llvm_value(other)))

    __add__ = __radd__ = partialmethod(_with, "add")
    __mul__ = __rmul__ = partialmethod(_with, "mul")
    __sub__ = partialmethod(_with, "sub")
    __floordiv__ = partialmethod(_with, "udiv")
    __mod__ = partialmethod(_with, "urem")
    __and__ = partialmethod(_with, "and_")
    __xor__ = partialmethod(_with, "xor")
    __rshift__ = partialmethod(_with, "ashr")

    def above_bits(self, count: "Integer | int") -> "Integer":
        """Return the bits above the lowest so many."""
        return self._with("lshr", count)

    def equals(self, other: "Integer | int") -> Any:
        """Return whether this is another integer, as LLVM has it."""
        return self.builder.icmp_unsigned("==", self.value, llvm_value(other))

    def below(self, other: Any) -> Any:
        """Return whether this is less than another integer, as LLVM has it."""
        return self.builder.icmp_unsigned("<", self.value, llvm_value(other))

    def where(self, condition: Any, other: "Integer") -> "Integer":
        """Return this where a condition holds, and another integer where not."""
        return Integer(self.builder, self.builder.select(condition, self.value, other.value))


class Variable:
    """An integer that changes; LLVM keeps it in a register.

    Args:
        place: A pointer to it.
        builder: Where instructions go.
    """

    def __init__(self, place: Any, builder: ir.IRBuilder) -> None:
        self._place, self._builder = place, builder

    def __call__(self) -> Integer:
        """Return what it is now."""
        return Integer(self._builder, self._builder.load(self._place))

    def set(self, number: Integer | int) -> None:
        """Give it another value."""
        self._builder.store(llvm_value(number), self._place)


def llvm_value(number: Integer | int) -> Any:
    """Return an integer as LLVM has it."""
    return number.value if isinstance(number, Integer) else ir.Constant(_I64, number)
