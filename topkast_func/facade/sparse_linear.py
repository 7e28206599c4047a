"""Layers whose sparse weight is one of a matrix product, which the kernels may compute."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from topkast_func.facade.sparse_layer import ForwardPass, SparseLayer
from topkast_func.facade.sparse_weight import weights_of
from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.linear import sparse_linear
from topkast_func.kernels.pattern import Pattern


class SparseLinear(SparseLayer):
    """Mixed into `torch.nn.Linear` and ``Conv1D``: kernels compute where that is faster."""

    _transposed: ClassVar[bool] = False
    """Whether the weight is [in, out]."""

    def forward(self, input: Tensor) -> Any:
        """Compute with α, on the kernels or densely."""
        multiply = on_kernels(self, "weight", "bias", self._transposed)
        return super().forward(input) if multiply is None else multiply(input)


def on_kernels(
    layer: nn.Module, key: str, bias: str, transposed: bool = False
) -> Callable[[Tensor], Tensor] | None:
    """Return the product of a layer with a weight as the kernels compute it.

    Args:
        layer: The layer.
        key: Name of the weight in it.
        bias: Name of what is added.
        transposed: Whether the weight is [in, out].

    Returns:
        The product, a function of the inputs; None where torch is to compute with α.
    """
    found = multiplied_by(layer, key)
    if found is None:
        return None
    values, pattern, engine = found
    with ForwardPass():
        added: Tensor | None = getattr(layer, bias)
    rows, columns = weights_of(layer)[key].rule.shape
    return lambda x: sparse_linear(x, values, pattern, (rows, columns), added, engine, transposed)


def multiplied_by(layer: nn.Module, key: str) -> tuple[Tensor, Pattern, EngineName] | None:
    """Return what kernels compute with a weight of a layer from.

    Args:
        layer: The layer.
        key: Name of the weight in it.

    Returns:
        θ on B, A first; the sets; who computes. None where torch is to compute with α.
    """
    weight = weights_of(layer).get(key)
    derived = None if weight is None else weight.derived(layer)
    sets = None if derived is None else derived.indices()
    if weight is None or sets is None or weight.probe is not None:
        return None
    values = weight.gathering.values(weight.theta(layer), sets)
    return values, sets.pattern, weight.rule.engine
