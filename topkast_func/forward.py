"""The sparse forward pass: any model at α = θ·1_A, with a gradient that reaches B."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from topkast_func.masks import Masks
from topkast_func.types import Model, Params, Tensors


def sparse_forward(
    model: Model, params: Params, masks: Mapping[str, Masks], *inputs: Any, **options: Any
) -> Any:
    """Run a model at its forward weights α = θ·1_A.

    The gradient with respect to θ is that of the loss at α, kept on B and zero elsewhere
    (Top-KAST, NeurIPS 2020, section 2.2); the gradient with respect to the inputs sees A
    only. Works under `torch.func.grad`, `vmap`, `torch.compile` and ``.backward()``.

    Args:
        model: A module, or a pure function ``apply(params, *inputs, **options)``. A module is
            never written to: its buffers are copied for the call.
        params: θ by name; for a module, all its trainable parameters, and any of its frozen
            parameters and buffers, which otherwise are the module's own.
        masks: Sets by name; parameters without masks are dense.
        *inputs: Inputs of the model.
        **options: Keyword inputs of the model.

    Returns:
        Whatever the model returns.

    Raises:
        ValueError: A parameter of the module is missing, a name is unknown to the module, or
            masks belong to no parameter.
        TypeError: ``model`` is not callable.

    Example:
        >>> theta = {"weight": torch.tensor([[3.0, 1.0]])}
        >>> masks = {"weight": Masks(torch.tensor([[True, False]]), torch.tensor([[True, True]]))}
        >>> sparse_forward(lambda p, x: x @ p["weight"].T, theta, masks, torch.ones(1, 2))
        tensor([[3.]])
    """
    check_names(model, params.keys())
    if unknown := [name for name in masks if name not in params]:
        raise ValueError(f"masks of unknown parameters: {unknown}")
    alpha = straight_through_all(params, masks)
    return bind(model, alpha, frozen(model), buffers(model, params))(*inputs, **options)


def straight_through(theta: Tensor, masks: Masks) -> Tensor:
    """Return α = θ·1_A with the gradient of the identity on B.

    Args:
        theta: The weight.
        masks: Its sets.

    Returns:
        α = θ·1_A + (θ − stop(θ))·1_{B∖A}: exactly θ on A and exactly 0 elsewhere.
    """
    ghost = torch.where(masks.backward, theta - theta.detach(), 0.0)
    return torch.where(masks.forward, theta, ghost)


def straight_through_all(params: Params, masks: Mapping[str, Masks]) -> Tensors:
    """Return α of every parameter, dense ones as they are.

    Args:
        params: θ by name.
        masks: Sets by name.

    Returns:
        α by name, in the order of ``params``.
    """
    return {
        name: straight_through(theta, masks[name]) if name in masks else theta
        for name, theta in params.items()
    }


def bind(model: Model, alpha: Params, constant: Params, buffers: Tensors) -> Callable[..., Any]:
    """Return ``apply(*inputs, **options)``: the model at the given tensors.

    Args:
        model: A module or a pure function.
        alpha: Weights by name.
        constant: Frozen parameters by name, where ``alpha`` has none.
        buffers: Buffers by name; what a module writes or assigns to them stands here after.

    Returns:
        The bound model.
    """
    if not isinstance(model, nn.Module):
        return partial(model, alpha)

    def apply(*inputs: Any, **options: Any) -> Any:
        tensors = {**constant, **alpha, **buffers}
        result = functional_call(model, tensors, inputs, options)
        buffers.update({name: tensors[name] for name in buffers})
        return result

    return apply


def trainable(model: object) -> Tensors:
    """Return the parameters of a module that require a gradient, by name; others have none."""
    if not isinstance(model, nn.Module):
        return {}
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: object) -> Tensors:
    """Return the parameters of a module that require no gradient, by name; others have none."""
    if not isinstance(model, nn.Module):
        return {}
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def buffers(model: object, given: Params | None = None) -> Tensors:
    """Copy the buffers of a module, by name; any other model has none.

    Args:
        model: A module, or anything else.
        given: Tensors to copy in place of the buffers of the same name.

    Returns:
        The copies.
    """
    if not isinstance(model, nn.Module):
        return {}
    held = {**dict(model.named_buffers()), **(given or {})}
    return {name: held[name].detach().clone() for name, _ in model.named_buffers()}


def tensors_of(model: object) -> Tensors:
    """Return the parameters and buffers of a module, by name; others have none."""
    if not isinstance(model, nn.Module):
        return {}
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_fit(model: object, tensors: Params) -> None:
    """Check that tensors are those of a module: each parameter and buffer, in its shape.

    Args:
        model: The module.
        tensors: Parameters and buffers by name.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs.
    """
    own = tensors_of(model)
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        raise ValueError(f"the state is of another model: missing {missing}, unknown {unknown}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"the state is of another model: {name!r} has shape "
                f"{tuple(tensors[name].shape)}, the model {tuple(tensor.shape)}"
            )


def check_names(model: Model, names: Collection[str]) -> None:
    """Check that parameter names fit a model.

    Args:
        model: A module, or a pure function (which takes any names).
        names: The names.

    Raises:
        TypeError: The model is not callable.
        ValueError: A trainable parameter of the module is missing, or a name is unknown.
    """
    if not callable(model):
        raise TypeError(f"model must be a module or a function, got {type(model).__name__}")
    if not isinstance(model, nn.Module):
        return
    known = tensors_of(model)
    missing = sorted(name for name in trainable(model) if name not in names)
    unknown = sorted(name for name in names if name not in known)
    if missing or unknown:
        raise ValueError(
            f"the parameters are not those of the model: missing {missing}, unknown {unknown}"
        )
