"""The sparse forward pass: any model at α = θ·1_A, with a gradient that reaches B."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from topkast_func.kernels.library import derives
from topkast_func.model.alone import alone_with, as_plain, may_draw
from topkast_func.model.alpha import alpha_when_read, straight_through
from topkast_func.model.fits import check_sets, several_kinds
from topkast_func.model.indexed import AnySets, Indexed
from topkast_func.model.layers import bound_to, stand_ins, standing_in
from topkast_func.model.modules import bind, buffers, frozen, ties
from topkast_func.types import Masks, Model, Params

Result = TypeVar("Result")


def sparse_forward(
    model: Model, params: Params, masks: Mapping[str, AnySets], *inputs: Any, **options: Any
) -> Any:
    """Run a model at its forward weights α = θ·1_A.

    The gradient with respect to θ is that of the loss at α, kept on B and zero elsewhere
    (Top-KAST, NeurIPS 2020, section 2.2); the gradient with respect to the inputs sees A
    only. Works under `torch.compile`, ``.backward()`` and the transforms of `torch.func`: `grad`,
    `vmap`, forward mode and derivatives of any order, which follow the same rule.

    Args:
        model: A module, or a pure function ``apply(params, *inputs, **options)``. A module is
            after the call what it was, its buffers too. Threads that share one take turns; where
            you compile the call yourself, one thread at a time may make it.
        params: θ by name; for a module, all its trainable parameters, and any of its frozen
            parameters and buffers, which otherwise are the module's own.
        masks: Sets by name, as masks or as `index_masks` returns them; parameters without are
            dense. Layers whose sets are indexed run on the kernels. Each call gathers
            their values from θ, which for a few rows takes longer than the product: for a
            trained model take `sparse_module`.
        *inputs: Inputs of the model.
        **options: Keyword inputs of the model.

    Returns:
        Whatever the model returns.

    Raises:
        ValueError: A parameter of the module is missing or has another shape, a name is unknown
            to the module, masks belong to no parameter or have another shape or device, or the
            model fails and its parameters are of several dtypes, layouts or devices.
        TypeError: ``model`` is not callable, ``params`` are not tensors by name, those with masks
            not dense ones of floating-point numbers, or masks are neither `Masks` of bool nor
            indexed.

    Example:
        >>> theta = {"weight": torch.tensor([[3.0, 1.0]])}
        >>> masks = {"weight": Masks(torch.tensor([[True, False]]), torch.tensor([[True, True]]))}
        >>> sparse_forward(lambda p, x: x @ p["weight"].T, theta, masks, torch.ones(1, 2))
        tensor([[3.]])
    """
    return run_at_alpha(model, params, masks, lambda apply: apply(*inputs, **options))


def run_at_alpha(
    model: Model,
    params: Params,
    masks: Mapping[str, AnySets],
    use: Callable[[Callable[..., Any]], Result],
) -> Result:
    """Use a model bound to α, in turn; where Dynamo traces it, as it is.

    Args:
        model: A module or a pure function.
        params: θ by name.
        masks: Sets by name, as masks or indexed.
        use: From the bound model to the result.

    Returns:
        What ``use`` returns.

    Raises:
        TypeError: See `sparse_forward`.
        ValueError: See `sparse_forward`.
        RuntimeError: The model raises one that the kinds of its parameters do not explain.
    """
    model = as_plain(model)

    def run() -> Result:
        check_sets(model, params, masks)
        return use(at_alpha(model, params, masks))

    if torch.compiler.is_dynamo_compiling():
        return run()
    try:
        return alone_with(model, run, may_draw(model))
    except RuntimeError as reason:
        problem = several_kinds(model, params)
        if problem is None or isinstance(reason, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{problem}: give tensors of one kind. It fails with {reason}") from reason


def at_alpha(model: Model, params: Params, masks: Mapping[str, AnySets]) -> Callable[..., Any]:
    """Return the model bound to α, with the gradient of the identity on B.

    Args:
        model: A module or a pure function.
        params: θ by name.
        masks: Sets by name, as masks or indexed.

    Returns:
        ``apply(*inputs, **options)``.
    """
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or derives()):
        masks = {n: s.active() if isinstance(s, Indexed) else s for n, s in masks.items()}
    indexed = {name: sets for name, sets in masks.items() if isinstance(sets, Indexed)}
    patterns = {name: sets.pattern for name, sets in indexed.items()}
    values = {name: sets.split(params[name]) for name, sets in indexed.items()}
    weights = {n: _weight(theta, masks.get(n), values.get(n)) for n, theta in params.items()}
    lending = [s for s in stand_ins(model) if s.needed(patterns)] if patterns else []
    apply = bind(model, ties(model), weights, frozen(model), buffers(model, params))

    def lent(*inputs: Any, **options: Any) -> Any:
        with standing_in(lending), bound_to(lending, weights, values, patterns):
            return apply(*inputs, **options)

    return lent if lending else apply


def _weight(theta: Tensor, sets: AnySets | None, values: Tensor | None) -> Tensor:
    """Return α of a weight, from its values where its sets are indexed."""
    if isinstance(sets, Indexed) and values is not None:
        parts = sets.places.tensor_split([sets.pattern.active_count])
        return alpha_when_read(values, parts, theta.shape)
    return straight_through(theta, sets) if isinstance(sets, Masks) else theta
