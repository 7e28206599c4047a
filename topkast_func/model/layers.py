"""Linear layers of a module on the kernels: their forward pass is lent, and given back."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.linear import sparse_linear
from topkast_func.kernels.pattern import Pattern
from topkast_func.types import Params


class Bound(NamedTuple):
    """What a layer computes with, as a matrix and for the kernels.

    Attributes:
        alpha: α, [out_features, in_features].
        values: θ on B, A first.
        pattern: The sets.
    """

    alpha: Tensor
    values: Tensor
    pattern: Pattern


class StandIn:
    """Stands in for the forward pass of a linear layer, which keeps all else.

    Args:
        layer: The layer.
        engine: Who computes the products.
    """

    def __init__(self, layer: nn.Linear, engine: EngineName) -> None:
        self.layer, self.engine = layer, engine
        self.bound: Bound | None = None

    def __reduce__(self) -> tuple[type["StandIn"], tuple[nn.Linear, EngineName]]:
        """Be copied with the layer, bound to nothing."""
        return StandIn, (self.layer, self.engine)

    def compute(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Return what the layer returns, on the kernels where its weight is the bound α."""
        layer, bound = self.layer, self.bound
        weight = layer.weight
        if bound is None or weight is not bound.alpha:
            return functional.linear(input, weight, layer.bias)
        shape = (layer.out_features, layer.in_features)
        return sparse_linear(input, bound.values, bound.pattern, shape, layer.bias, self.engine)


def kernel_layers(model: object) -> dict[str, nn.Linear]:
    """Return the linear layers of a module that kernels can compute, by name of their weight.

    These are layers with the forward pass of `torch.nn.Linear` whose weight is a parameter of no
    other layer, and none that is computed from others (`torch.nn.utils.parametrize`); one that is
    reached under several names goes by the first. Anything but a module has none, and
    `torch.nn.MultiheadAttention` reads its projection's weight itself.
    """
    if not isinstance(model, nn.Module):
        return {}
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {
        f"{name}.weight".lstrip("."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, NonDynamicallyQuantizableLinear)
        and "forward" not in vars(layer)
        and type(layer).forward is nn.Linear.forward
        and uses[id(layer._parameters.get("weight"))] == 1
    }


@contextmanager
def standing_in(stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Let layers compute by their stand-ins for a while.

    Args:
        stand_ins: What stands in for each layer.

    Yields:
        Nothing; the layers are as they were after.
    """
    for stand_in in stand_ins.values():
        vars(stand_in.layer)["forward"] = stand_in.compute
    try:
        yield
    finally:
        for stand_in in stand_ins.values():
            del vars(stand_in.layer)["forward"]


@contextmanager
def bound_to(
    stand_ins: Mapping[str, StandIn],
    alpha: Params,
    values: Params,
    patterns: Mapping[str, Pattern],
) -> Iterator[None]:
    """Let stand-ins compute on the kernels wherever they meet α.

    A layer that is given another weight, by the model itself or by whoever calls it beside, is
    computed with that.

    Args:
        stand_ins: What stands in, by name of the weight.
        alpha: α by name: the very tensors that the model is given.
        values: θ on B by name.
        patterns: Sets by name.

    Yields:
        Nothing.
    """
    for name, stand_in in stand_ins.items():
        stand_in.bound = Bound(alpha[name], values[name], patterns[name])
    try:
        yield
    finally:
        for stand_in in stand_ins.values():
            stand_in.bound = None
