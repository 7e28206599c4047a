"""Linear layers of a module on the kernels: their forward pass is lent, and given back."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.linear import sparse_linear
from topkast_func.kernels.pattern import Pattern, flattened, nested
from topkast_func.types import Tensors

CHILD = "topkast_func"
"""Name of the child that holds the tensors of a layer's kernels while they stand in."""

INDEX = tuple(f"index_{i}" for i in range(7))
"""Its buffers, beside ``values``: the tensors of a pattern."""


class StandIn(nn.Module):
    """Stands in for the forward pass of a linear layer; its tensors come by `functional_call`.

    Args:
        layer: The layer. It keeps its place, type, hooks and attributes.
        engine: Who computes the products.
    """

    values: Tensor

    def __init__(self, layer: nn.Linear, engine: EngineName) -> None:
        super().__init__()
        for name in ("values", *INDEX):
            self.register_buffer(name, torch.empty(0))

        def compute(input: Tensor) -> Tensor:  # the name that nn.Linear gives it
            pattern = nested([getattr(self, name) for name in INDEX])
            shape = (layer.out_features, layer.in_features)
            return sparse_linear(input, self.values, pattern, shape, layer.bias, engine)

        self.compute = compute


def kernel_layers(model: object) -> dict[str, nn.Linear]:
    """Return the linear layers of a module that kernels can compute, by name of their weight.

    These are layers with the forward pass of `torch.nn.Linear` whose weight is a parameter of no
    other layer; one that is reached under several names goes by the first. Anything but a module
    has none, and `torch.nn.MultiheadAttention` reads its projection's weight itself.
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
        and uses[id(layer.weight)] == 1
    }


@contextmanager
def standing_in(
    layers: Mapping[str, nn.Linear], stand_ins: Mapping[str, StandIn]
) -> Iterator[None]:
    """Let layers compute on the kernels for a while.

    Args:
        layers: What `kernel_layers` returns.
        stand_ins: For each of some layers, by the same names, what stands in.

    Yields:
        Nothing; the layers are as they were after.
    """
    for name, stand_in in stand_ins.items():
        layers[name]._modules[CHILD] = stand_in
        vars(layers[name])["forward"] = stand_in.compute
    try:
        yield
    finally:
        for name in stand_ins:
            del layers[name]._modules[CHILD], vars(layers[name])["forward"]


def kernel_tensors(names: Collection[str], values: Tensors, sets: Mapping[str, Pattern]) -> Tensors:
    """Return the tensors of what stands in, by name in the module."""
    tensors = {}
    for name in names:
        prefix = f"{name.removesuffix('weight')}{CHILD}."
        tensors[f"{prefix}values"] = values[name]
        index = zip(INDEX, flattened(sets[name]), strict=True)
        tensors.update({f"{prefix}{key}": tensor for key, tensor in index})
    return tensors
