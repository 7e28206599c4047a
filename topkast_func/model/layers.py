"""Layers of a module on the kernels: their forward pass is lent, and given back."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.pattern import Pattern
from topkast_func.model.attention import AttentionStandIn
from topkast_func.model.convolution import ConvolutionStandIn
from topkast_func.model.modules import check_parameters
from topkast_func.model.stand_in import Bound, Product, StandIn, TransposedStandIn
from topkast_func.types import Params

KINDS = (StandIn, TransposedStandIn, AttentionStandIn, ConvolutionStandIn)


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
        kind = next((kind for kind in KINDS if kind.fits(layer)), None)
        if kind is None or "forward" in vars(layer):
            continue
        own = [id(_weight(layer, path)) for path in kind.weights]
        if all(weight in names for weight in own):
            products = (Product(names[weight], engine, kind.transposed) for weight in own)
            found.append(kind(layer, tuple(products)))
    return found


def _weight(layer: nn.Module, path: str) -> Tensor | None:
    """Return a parameter of a layer; None where it is computed from others."""
    owner, _, key = path.rpartition(".")
    return layer.get_submodule(owner)._parameters.get(key)


def kernel_weights(model: object) -> dict[str, torch.Size]:
    """Return the shapes of the weights of a module that kernels can multiply by, by name.

    Args:
        model: A module, in a turn of one's own; anything else has none.

    Returns:
        The shapes.

    Raises:
        ValueError: A parameter of the module is another tensor.
    """
    if not isinstance(model, nn.Module):
        return {}
    check_parameters(model)
    products = [product for stand_in in stand_ins(model) for product in stand_in.products]
    return {product.name: model.get_parameter(product.name).shape for product in products}


@contextmanager
def standing_in(stand_ins: Iterable[StandIn]) -> Iterator[None]:
    """Let layers compute by their stand-ins within the context.

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

    A layer that is given another weight, by the model or by another caller, computes with that.

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
