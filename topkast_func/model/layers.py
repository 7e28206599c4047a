"""Layers of a module on the kernels: their forward pass is lent, and given back."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.linear import sparse_linear
from topkast_func.kernels.pattern import Pattern
from topkast_func.types import Params


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
        """Be copied bound to nothing."""
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
    def fits(layer: nn.Module) -> bool:
        """Return whether this computes what the layer does."""
        return (
            isinstance(layer, nn.Linear)
            and not isinstance(layer, NonDynamicallyQuantizableLinear)  # attention reads its weight
            and type(layer).forward is nn.Linear.forward
        )

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
    def fits(layer: nn.Module) -> bool:
        """Return whether the layer is one; nothing is imported to see it."""
        kind = type(layer)
        return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")

    def compute(self, x: Tensor) -> Tensor:
        """Return what the layer returns."""
        return super().compute(x)


class AttentionStandIn(StandIn):
    """Stands in for `torch.nn.MultiheadAttention` where a batch attends to itself.

    Else, and where weights of the attention are asked for, the layer computes with α.
    """

    weights = ("in_proj_weight", "out_proj.weight")

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Return whether the layer projects to queries, keys and values at once, and no more."""
        return (
            isinstance(layer, nn.MultiheadAttention)
            and type(layer).forward is nn.MultiheadAttention.forward
            and layer.in_proj_weight is not None
            and layer.bias_k is None
            and not layer.add_zero_attn
        )

    def compute(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the layer returns."""
        layer, (project, project_out) = self.layer, self.products
        itself = query is key and key is value and query.dim() == 3 and not query.is_nested
        if not itself or need_weights or (is_causal and attn_mask is None):
            told = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            result: tuple[Tensor, Tensor | None]
            result = type(layer).forward(layer, query, key, value, *told)
            return result
        x = query if layer.batch_first else query.transpose(0, 1)
        projected = project(x, layer.in_proj_weight, layer.in_proj_bias)
        size = (*projected.shape[:2], 3, layer.num_heads, -1)
        q, k, v = projected.view(size).permute(2, 0, 3, 1, 4)
        causal = is_causal and key_padding_mask is None
        mask = None if causal else _added(attn_mask, key_padding_mask, layer.num_heads, x.dtype)
        dropped = layer.dropout if layer.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropped, causal)
        joined = mixed.transpose(1, 2).flatten(2)
        y = project_out(joined, layer.out_proj.weight, layer.out_proj.bias)
        return y if layer.batch_first else y.transpose(0, 1), None


def _added(
    attention: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Return what is added to the scores [batch, heads, length, length]: −∞ where a mask holds."""
    masks = []
    if attention is not None:
        masks.append(
            attention if attention.dim() == 2 else attention.view(-1, heads, *attention.shape[1:])
        )
    if padding is not None:
        masks.append(padding[:, None, None])
    floats = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
        for mask in masks
    ]
    return sum(floats[1:], floats[0]) if floats else None


KINDS = (StandIn, TransposedStandIn, AttentionStandIn)


def stand_ins(model: object, engine: EngineName = "auto") -> list[StandIn]:
    """Return what can stand in for the layers of a module that kernels can compute.

    A layer whose weight is computed from others (`torch.nn.utils.parametrize`), or whose forward
    pass is not that of its class, is none of them. Anything but a module has none.

    Args:
        model: The module, or anything else.
        engine: Who computes the products.

    Returns:
        The stand-ins, in the order of the modules.
    """
    if not isinstance(model, nn.Module):
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for layer in model.modules():
        for kind in KINDS:
            if "forward" in vars(layer) or not kind.fits(layer):
                continue
            own = [_weight(layer, path) for path in kind.weights]
            if all(id(weight) in names for weight in own):
                named = (names[id(weight)] for weight in own)
                found.append(kind(layer, tuple(Product(n, engine, kind.transposed) for n in named)))
    return found


def _weight(layer: nn.Module, path: str) -> Tensor | None:
    """Return a parameter of a layer; None where it is computed from others."""
    owner, _, key = path.rpartition(".")
    return layer.get_submodule(owner)._parameters.get(key)


def kernel_weights(model: object) -> dict[str, torch.Size]:
    """Return the shapes of the weights of a module that kernels can multiply by, by name."""
    if not isinstance(model, nn.Module):
        return {}
    products = [product for stand_in in stand_ins(model) for product in stand_in.products]
    return {product.name: model.get_parameter(product.name).shape for product in products}


@contextmanager
def standing_in(stand_ins: Iterable[StandIn]) -> Iterator[None]:
    """Let layers compute by their stand-ins for a while.

    Args:
        stand_ins: What stands in, one for a layer.

    Yields:
        Nothing; the layers are as they were after.
    """
    lent = [(vars(stand_in.layer), stand_in.compute) for stand_in in stand_ins]
    for attributes, compute in lent:
        attributes["forward"] = compute
    try:
        yield
    finally:
        for attributes, _ in lent:
            del attributes["forward"]


@contextmanager
def bound_to(
    stand_ins: Iterable[StandIn], alpha: Params, values: Params, patterns: Mapping[str, Pattern]
) -> Iterator[None]:
    """Let stand-ins compute on the kernels wherever they meet α.

    A layer that is given another weight, by the model itself or by whoever calls it beside, is
    computed with that.

    Args:
        stand_ins: What stands in.
        alpha: α by name: the very tensors that the model is given.
        values: θ on B by name.
        patterns: Sets by name.

    Yields:
        Nothing.
    """
    products = [p for stand_in in stand_ins for p in stand_in.products if p.name in patterns]
    for product in products:
        name = product.name
        product.bound = Bound(alpha[name], values[name], patterns[name])
    try:
        yield
    finally:
        for product in products:
            product.bound = None
