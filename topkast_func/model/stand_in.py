"""What stands in for the forward pass of a layer: its products with weights, on the kernels."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.linear import sparse_linear
from topkast_func.kernels.pattern import Pattern
from topkast_func.model.axes import is_transposed

CALLED = ("_conv_forward", "merge_masks")
"""Methods that forward passes of torch's layers call on the layer."""


def computes_as(kind: type, *bases: type) -> bool:
    """Return whether layers of a class compute as those of one that it is, or is derived from."""
    called = ("forward", *CALLED)
    return any(
        issubclass(kind, base)
        and all(getattr(kind, name, None) is getattr(base, name, None) for name in called)
        for base in bases
    )


def calls_its_own(layer: nn.Module) -> bool:
    """Return whether a layer, not its class, has a method that its forward pass calls."""
    return any(name in vars(layer) for name in CALLED)


class Bound(NamedTuple):
    """What a product is computed with, as a matrix and for the kernels.

    Attributes:
        alpha: α, a matrix.
        values: θ on B, A first.
        pattern: The sets.
    """

    alpha: Tensor
    values: Tensor
    pattern: Pattern


class Product:
    """The product of a layer with one of its weights.

    Args:
        name: Name of the weight in the model; the first, if it has several.
        engine: Who computes the product.
        transposed: Whether the layer multiplies by a weight [in, out] as it is, and not by the
            transpose of one [out, in].
    """

    def __init__(self, name: str, engine: EngineName, transposed: bool) -> None:
        self.name, self.engine, self.transposed = name, engine, transposed
        self.bound: Bound | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the product without what it is bound to."""
        return Product, (self.name, self.engine, self.transposed)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product and the bias, on the kernels where the weight is the bound α."""
        bound = self.bound
        if bound is None or weight is not bound.alpha:
            return functional.linear(input, weight.t() if self.transposed else weight, bias)
        rows, columns = weight.shape
        return sparse_linear(
            input, bound.values, bound.pattern, (rows, columns), bias, self.engine, self.transposed
        )


class StandIn:
    """Stands in for the forward pass of `torch.nn.Linear`, which keeps all else.

    Args:
        layer: The layer.
        products: Its products, in the order of ``weights``.
    """

    weights: ClassVar[tuple[str, ...]] = ("weight",)
    """The weights of the layer that it multiplies by."""

    transposed: ClassVar[bool] = False
    """Whether they are [in, out]."""

    def __init__(self, layer: Any, products: tuple[Product, ...]) -> None:
        self.layer, self.products = layer, products

    @staticmethod
    def is_of(kind: type) -> bool:
        """Return whether layers of a class compute as this does."""
        read_by_attention = issubclass(kind, NonDynamicallyQuantizableLinear)
        return computes_as(kind, nn.Linear) and not read_by_attention

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether this computes what the layer does, as that is now."""
        return cls.is_of(type(layer))

    def places(self) -> list[tuple[nn.Module, str]]:
        """Return where its weights are: the layer or a part of it, and the key there."""
        paths = [path.rpartition(".") for path in self.weights]
        return [(self.layer.get_submodule(owner), key) for owner, _, key in paths]

    def needed(self, patterns: Mapping[str, Pattern]) -> bool:
        """Return whether a product of it has a pattern, and nobody else stands in."""
        named = any(product.name in patterns for product in self.products)
        return named and "forward" not in vars(self.layer)

    def compute(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """Return what the layer returns."""
        return self.products[0](input, self.layer.weight, self.layer.bias)


class TransposedStandIn(StandIn):
    """Stands in for ``transformers.pytorch_utils.Conv1D``, the linear layer of GPT-2."""

    transposed = True

    @staticmethod
    def is_of(kind: type) -> bool:
        """Return whether a class is that one; nothing is imported to see it."""
        return is_transposed(kind)

    def compute(self, x: Tensor) -> Tensor:
        """Return what the layer returns."""
        return super().compute(x)
