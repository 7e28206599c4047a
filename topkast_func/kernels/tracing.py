"""What Dynamo is told of this package, imported by what it traces: the marks load Dynamo."""

from importlib import import_module
from typing import Any

import torch

from topkast_func.kernels.costs import Layer
from topkast_func.kernels.engines import EngineName, choose


@torch.compiler.assume_constant_result
def constant(name: EngineName, *layer: Any) -> str:
    """Return the name of the engine of a layer, of whose sizes none is a symbol.

    Kernels that are made, as those of "numba" are, are made while the graph is traced.
    """
    given = Layer(*layer)
    found = choose(name, given).engine
    if found == "numba":
        module = "shifted_cpu" if given.rows else "numba_cpu"
        prepare = import_module(f"topkast_func.kernels.{module}").prepare
        prepare(given.block_shape, given.dtype)
    return found
