"""The exploration penalty, and the loss that carries it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from topkast_func.checks import check_callable, check_count, check_type
from topkast_func.config import TopKastConfig
from topkast_func.model.fits import check_sets_of
from topkast_func.model.forward import run_at_alpha
from topkast_func.model.indexed import AnySets, Indexed
from topkast_func.penalty import masked_parts, summed_penalty, terms_of
from topkast_func.types import LossFn, Model, Params


def exploration_penalty(
    params: Params, masks: Mapping[str, AnySets], config: TopKastConfig, *, step: int = 0
) -> Tensor:
    """Sum the exploration penalty over the sparse tensors, before its weight λ.

    Σ c_i·‖θ_i‖ with c_i = 1 on A, 1/D on B∖A and 0 elsewhere (Top-KAST, NeurIPS 2020,
    section 2.3), D the forward density that the configuration gives the tensor. The forms
    are `l2` ½ Σ c_i θ_i², `l1` Σ c_i abs(θ_i) and `group_l2` Σ (‖θ_A‖₂ + ‖θ_{B∖A}‖₂ / D).
    The gradient is 0 where a norm is 0. Half-precision weights are summed in float32.

    Args:
        params: θ by name.
        masks: Sets by name, as masks or as `index_masks` returns them.
        config: Form of the penalty and densities.
        step: Number of the step, where densities change over time.

    Returns:
        The penalty, 0-d; zero where ``config.penalty`` is None or the method does not explore.

    Raises:
        TypeError: ``config`` is no configuration, ``step`` no integer, or see `sparse_forward`.
        ValueError: ``step`` is negative, the configuration gives a masked parameter no sparsity,
            or masks are not those of the parameters, see `sparse_forward`.

    Departures:
        The paper prints one norm and calls it L2; the three readings in use are offered.

    Example:
        >>> import torch
        >>> from topkast_func.types import Masks
        >>> theta = {"weight": torch.tensor([[3.0, 1.0]])}
        >>> masks = {"weight": Masks(torch.tensor([[True, False]]), torch.tensor([[True, True]]))}
        >>> config = TopKastConfig(forward_sparsity=0.5, backward_sparsity=0.0, penalty="l1")
        >>> exploration_penalty(theta, masks, config)
        tensor(5.)
    """
    check_type("config", config, TopKastConfig)
    step = check_count("step", step, 0)
    check_sets_of(params, masks)
    shapes = {name: params[name].shape for name in masks}
    device = next((theta.device for theta in params.values()), torch.device("cpu"))
    terms = terms_of(shapes, config, step)
    return summed_penalty(terms, lambda name: parts_of(params[name], masks[name]), device)


def parts_of(theta: Tensor, sets: AnySets) -> tuple[Tensor, Tensor]:
    """Return θ on A and θ on B∖A, zero or absent elsewhere."""
    if isinstance(sets, Indexed):
        values, count = sets.split(theta), sets.pattern.active_count
        return values[:count], values[count:]
    return masked_parts(theta, sets)


def penalized_loss(
    model: Model,
    loss_fn: LossFn,
    params: Params,
    masks: Mapping[str, AnySets],
    batch: Any,
    config: TopKastConfig,
    *,
    step: int = 0,
) -> Tensor:
    """Return the loss of a batch at α plus λ times the exploration penalty.

    Args:
        model: A module, or a pure function ``apply(params, *inputs)``.
        loss_fn: ``loss_fn(apply, batch)`` to a scalar, where ``apply(*inputs)`` is the sparse
            forward pass bound to the current parameters. Of a pair (scalar, aux) the scalar counts.
        params: θ by name.
        masks: Sets by name, as masks or as `index_masks` returns them.
        batch: Whatever ``loss_fn`` takes.
        config: Form, weight λ and densities of the penalty.
        step: Number of the step, where densities change over time.

    Returns:
        The loss, 0-d.

    Raises:
        TypeError: ``loss_fn`` is no function of (apply, batch) or returns no scalar tensor,
            ``config`` is no configuration, ``step`` no integer, or see `sparse_forward`.
        ValueError: ``step`` is negative, or the parameters are not those of the model, nor the
            masks theirs.
    """
    check_loss_fn(loss_fn, model)
    check_type("config", config, TopKastConfig)
    step = check_count("step", step, 0)

    def use(apply: Callable[..., Any]) -> Tensor:
        return loss_and_aux(loss_fn(apply, batch))[0]

    data_loss = run_at_alpha(model, params, masks, use)
    penalty = exploration_penalty(params, masks, config, step=step)
    return data_loss + config.penalty_weight * penalty


def check_loss_fn(loss_fn: object, model: object) -> None:
    """Check that a loss function can be called, is none of torch, and not the model in its place.

    Args:
        loss_fn: The function.
        model: The model.

    Raises:
        TypeError: It cannot, or is one of torch, which takes outputs and targets, or it has
            parameters and the model is no module.
    """
    check_callable("loss_fn", loss_fn)
    held = isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters())
    if held and not isinstance(model, nn.Module):
        raise TypeError(
            f"loss_fn must be a function loss_fn(apply, batch), got {type(loss_fn).__name__}, a "
            "module with parameters: the order is make_train_step(model, loss_fn, …)"
        )
    if getattr(loss_fn, "__module__", None) in ("torch.nn.functional", "torch.nn.modules.loss"):
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(
            f"loss_fn is called as loss_fn(apply, batch), and {name} takes outputs and targets: "
            "pass a function such as lambda apply, batch: loss(apply(batch[0]), batch[1])"
        )


def loss_and_aux(result: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the loss, and what came with it.

    Args:
        result: What a loss function returned: a 0-d tensor, or a pair of it and a tree of tensors.

    Returns:
        The loss, and the tree in a tuple, which is empty where there is none.

    Raises:
        TypeError: The loss is not a tensor, not 0-d or not of a floating-point dtype, or a leaf of
            the tree is no tensor.
    """
    pair = isinstance(result, tuple) and len(result) == 2
    loss, aux = (result[0], result[1:]) if pair else (result, ())
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a 0-d tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise TypeError(f"loss_fn must return a 0-d tensor, got shape {tuple(loss.shape)}")
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn must return a real floating-point number, got {loss.dtype}")
    for leaf in tree_leaves(aux):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"what loss_fn returns beside the loss must be tensors, got {leaf!r}")
    return loss, aux
