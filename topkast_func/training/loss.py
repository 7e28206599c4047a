"""The exploration penalty, and the loss that carries it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from topkast_func.config import TopKastConfig
from topkast_func.model.alone import forward_alone, uncompiled
from topkast_func.model.forward import AnySets, Indexed, at_alpha, check_sets
from topkast_func.penalty import masked_parts, summed_penalty
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
        ValueError: The configuration gives a masked parameter no sparsity.

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
    shapes = {name: params[name].shape for name in masks}
    device = next(iter(params.values())).device
    parts = partial(_parts, params, masks)
    return summed_penalty(shapes, parts, config, device, step)


def _parts(params: Params, masks: Mapping[str, AnySets], name: str) -> tuple[Tensor, Tensor]:
    """Return θ on A and θ on B∖A, zero or absent elsewhere."""
    theta, sets = params[name], masks[name]
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
            forward pass bound to the current parameters.
        params: θ by name.
        masks: Sets by name, as masks or as `index_masks` returns them.
        batch: Whatever ``loss_fn`` takes.
        config: Form, weight λ and densities of the penalty.
        step: Number of the step, where densities change over time.

    Returns:
        The loss, 0-d.

    Raises:
        TypeError: ``loss_fn`` returns no scalar tensor, or see `sparse_forward`.
        ValueError: The parameters are not those of the model, nor the masks theirs.
    """
    model = uncompiled(model)

    def run() -> Tensor:
        check_sets(model, params, masks)
        return check_scalar(loss_fn(at_alpha(model, params, masks), batch))

    data_loss = forward_alone(model, run)
    penalty = exploration_penalty(params, masks, config, step=step)
    return data_loss + config.penalty_weight * penalty


def check_scalar(loss: object) -> Tensor:
    """Return ``loss`` if it is a 0-d tensor.

    Args:
        loss: What a loss function returned.

    Returns:
        The loss.

    Raises:
        TypeError: It is not a tensor, or not 0-d.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a 0-d tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise TypeError(f"loss_fn must return a 0-d tensor, got shape {tuple(loss.shape)}")
    return loss
