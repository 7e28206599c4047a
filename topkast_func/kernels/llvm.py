"""Kernels: machine code for work that is cut into parts, made by LLVM when it is first needed.

A tenth of a second each, so that nothing is cached between processes. Loops are emitted unrolled
and in vectors, so that the first level of LLVM's passes serves them as well as the third.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from llvmlite import binding, ir
from torch import Tensor

from topkast_func.compiling import untold
from topkast_func.kernels.halves import HalfTile
from topkast_func.kernels.integers import Integer
from topkast_func.kernels.threads import in_parallel
from topkast_func.kernels.vectors import Tile
from topkast_func.kernels.waiting import Part

LITTLE = 2**14
"""Work for which a thread is not asked: some 5 µs, less than it takes to wake."""

_I64 = ir.IntType(64)
_LOCK = threading.Lock()
"""Held while LLVM compiles; a fork waits for it, or the child would find it locked for ever."""

_ENGINES: list[Any] = []
"""Own the code of kernels, which lasts as long as the process."""

os.register_at_fork(
    before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
)


class Kernel:
    """Work that is cut into parts, on tensors and integers.

    Args:
        emit: ``emit(tile, part, parts, *integers)`` emits the code of one part; of tensors it is
            given the addresses.
        dtype: float32, float64 or bfloat16.
    """

    def __init__(self, emit: Callable[..., None], dtype: torch.dtype) -> None:
        self._emit, self._dtype = emit, dtype
        self._part: Part | None = None

    def __call__(
        self, *arguments: Tensor | int, parts: int | None = None, work: int = LITTLE
    ) -> None:
        """Do the work, in threads where they are free and there is enough for them.

        Args:
            *arguments: What `emit` takes; what is written to is contiguous.
            parts: How many; None for as many as there are threads.
            work: About how many numbers are moved, or multiplied and added.
        """
        held = [a if isinstance(a, int) else a.contiguous() for a in arguments]
        integers = [a if isinstance(a, int) else _address(a) for a in held]
        parts = 1 if parts is None and work < LITTLE else parts
        in_parallel(self._part or self.made(), parts, integers)

    def made(self) -> Part:
        """Return the machine code, made at the first call."""
        with _LOCK, untold():
            if self._part is None:
                self._part = _machine_code(self._source())
        return self._part

    def _source(self) -> str:
        """Return ``kernel(next, parts, *integers)`` for LLVM, which does part after part.

        Whoever calls it takes the parts that nobody has taken; ``next`` counts them.
        """
        module = ir.Module("topkast_func")
        kind = ir.FunctionType(ir.VoidType(), [_I64.as_pointer()])
        function = ir.Function(module, kind, "kernel")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        numbers = [
            Integer(builder, builder.load(builder.gep(function.args[0], [ir.Constant(_I64, i)])))
            for i in range(1, len(signature(self._emit).parameters) - 1)
        ]
        take, work, done = map(function.append_basic_block, ("take", "work", "done"))
        builder.branch(take)
        builder.position_at_end(take)
        taken = builder.atomic_rmw("add", function.args[0], ir.Constant(_I64, 1), "monotonic")
        part = Integer(builder, taken)
        builder.cbranch(part.below(numbers[0]), work, done)
        builder.position_at_end(work)
        self._emit(_tile(builder, self._dtype), part, *numbers)
        builder.branch(take)
        builder.position_at_end(done)
        builder.ret_void()
        return str(module)


def _tile(builder: ir.IRBuilder, dtype: torch.dtype) -> Tile:
    """Return what emits the arithmetic of a dtype."""
    if dtype == torch.bfloat16:
        return HalfTile(builder, multiplies_bfloat16())
    return Tile(builder, dtype)


def multiplies_bfloat16() -> bool:
    """Return whether LLVM knows that this processor multiplies bfloat16."""
    return "+avx512bf16" in _features()


def _address(tensor: Tensor) -> int:
    """Return where the entries of a tensor are."""
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} has no memory: it was freed")
    return address


@cache
def _target() -> Any:
    """Return what LLVM compiles for: this processor."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=_features(),
        opt=3,
        jit=True,
    )


def _features() -> str:
    """Return what this processor has beyond what its name says, where LLVM knows it."""
    try:
        return str(binding.get_host_cpu_features().flatten())
    except RuntimeError:
        return ""


def _machine_code(source: str) -> Part:
    """Compile the function ``kernel`` of a module."""
    target = _target()
    module = binding.parse_assembly(source)
    options = binding.create_pipeline_tuning_options(speed_level=1)
    passes = binding.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _ENGINES.append(engine)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("kernel"))
