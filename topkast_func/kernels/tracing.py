"""What Dynamo is told of this package, imported by what it traces: the marks load Dynamo."""

from typing import Any

import torch

from topkast_func.kernels.costs import Layer
from topkast_func.kernels.engines import EngineName, choose


@torch.compiler.assume_constant_result
def chosen(name: EngineName, *layer: Any) -> str:
    """Return the name of the engine of a layer, of whose sizes none is a symbol."""
    return choose(name, Layer(*layer)).engine
