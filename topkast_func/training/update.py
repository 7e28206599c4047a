"""One update of a state: the pure function of tensors that is compiled."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from topkast_func.config import TopKastConfig
from topkast_func.distributed.parallel import Alone, DataParallel, Found
from topkast_func.model.layers import bound_to
from topkast_func.model.modules import bind, ties
from topkast_func.model.stand_in import StandIn
from topkast_func.penalty import Terms
from topkast_func.powerprop import theta_of
from topkast_func.training.derivative import gradient_and_value
from topkast_func.training.loss import loss_and_aux
from topkast_func.training.optim import (
    Optimizer,
    OptimizerState,
    Rate,
    check_slots,
    global_norm,
    updated,
)
from topkast_func.training.readout import narrowed
from topkast_func.training.state import TrainState
from topkast_func.types import LossFn, Model, Tensors, changed

Objective: TypeAlias = tuple[Tensor, tuple[Tensor, Tensor, tuple[Any, ...], Tensors]]
"""The loss; beside it the data loss, the penalty, what else the loss function returned, and the
buffers as the model left them."""

BatchLoss: TypeAlias = Callable[
    [tuple[int, ...], TrainState, Any, Tensors], tuple[Tensor, tuple[Any, ...], Tensors]
]
"""From the layers that are lent, a state, a batch, and θ on B in place of the values of the state:
the data loss, what else the loss function returned, and the buffers as the model left them."""

Moved: TypeAlias = tuple[TrainState, tuple[Tensor, Tensor, Tensor, Tensor], tuple[Any, ...]]
"""The state after a step; loss, data loss, penalty and norm of the gradient; aux, if any."""


CPU = torch.device("cpu")


def update_of(
    model: Model,
    loss_fn: LossFn,
    config: TopKastConfig,
    terms: Terms,
    optimizer: Optimizer,
    layers: Sequence[StandIn],
    ranks: Alone,
) -> Callable[..., Moved]:
    """Return the step of a stage, without its refresh: a pure function of tensors.

    ``terms`` are those of the penalty in that stage. It is run by `run_at`, which counts; the step
    and the calls that it returns are as before.
    """
    batch_loss = batch_loss_of(model, loss_fn, layers)

    def step(
        lent: tuple[int, ...],
        phi: tuple[str, ...],
        state: TrainState,
        batch: Any,
        lr: Rate,
        share: Tensor | None,
    ) -> Moved:
        weights = state.weights

        def objective(values: Tensors) -> Objective:
            values = values | {n: theta_of(values[n], config.powerprop) for n in phi}
            data_loss, aux, written = batch_loss(lent, state, batch, values)
            penalty = weights.penalty(values, terms)
            loss = data_loss + config.penalty_weight * penalty
            return loss, (data_loss, penalty, aux, written)

        with torch.no_grad():
            grads, (loss, beside) = gradient_and_value(objective, weights.values)
            data_loss, penalty, aux, written = beside
            if isinstance(ranks, DataParallel) and share is not None:
                own = Found(grads, data_loss, aux, written)
                grads, data_loss, aux, written = ranks.whole(share, own, state.buffers)
                loss = data_loss + config.penalty_weight * penalty
            rate = tree_map(lambda given: given.reshape(()), lr)
            updates, moved = updated(optimizer, grads, state.optimizer, weights.values, rate)
            after = changed(
                state,
                weights=weights.add(updates),
                buffers=written,
                optimizer=OptimizerState(state.optimizer.step, weights.mask_slots(moved.slots)),
            )
            norm = global_norm(grads)
        return after, (loss, data_loss, penalty, norm), tree_map(torch.clone, aux)

    return step


def run_at(
    run: Callable[..., Moved],
    lent: Sequence[int],
    state: TrainState,
    batch: Any,
    rate: Rate,
    optimizer: Optimizer,
    share: Tensor | None,
) -> Moved:
    """Run what `update_of` returns at a state, and count.

    Args:
        run: The function, compiled or not.
        lent: Places of the layers that are lent.
        state: The state.
        batch: The batch.
        rate: The learning rate.
        optimizer: The optimiser.
        share: Share of this rank.

    Returns:
        What ``run`` returns, with the step and the calls of the optimiser of the state after.

    Raises:
        ValueError: See `check_slots`.
    """
    place = _place_of(state)
    rate = tree_map(partial(_number, place), rate)
    share = None if share is None else _number(place, share)
    calls = state.optimizer.step
    held = calls if place == CPU else _number(place, calls)
    bare = changed(state, exponents={}, optimizer=changed(state.optimizer, step=held))
    after, numbers, aux = run(tuple(lent), tuple(state.exponents), bare, batch, rate, share)
    check_slots(optimizer, state.optimizer.slots, after.optimizer.slots)
    calls = calls + 1
    after = changed(
        after,
        step=state.step + (int(calls) % optimizer.every == 0),
        exponents=state.exponents,
        optimizer=changed(after.optimizer, step=calls),
    )
    return after, numbers, aux


def _place_of(state: TrainState) -> torch.device | None:
    """Return the device of the values; None where they are on several, or it has no float64."""
    devices = {value.device for value in state.weights.values.values()}
    place = devices.pop()
    return None if devices or place.type == "mps" else place


def _number(place: torch.device | None, number: Tensor) -> Tensor:
    """Return a number as a graph takes it: on its device, as kernels of one read no other memory.

    There it is written by a launch, for which nobody waits, and keeps no CUDA graph from being
    made. On a CPU it gets a dimension: torch.compile makes a symbol of a 0-d float64 there, and
    then traces everything twice.
    """
    if place is None:
        return number
    if number.device.type != "cpu":
        return number.to(place)
    if place == CPU:
        return number.reshape(1)
    return torch.full((), number.item(), dtype=number.dtype, device=place)


def batch_loss_of(model: Model, loss_fn: LossFn, layers: Sequence[StandIn]) -> BatchLoss:
    """Return what a step differentiates, but for the penalty."""
    tied = ties(model)

    def batch_loss(
        lent: tuple[int, ...], state: TrainState, batch: Any, values: Tensors
    ) -> tuple[Tensor, tuple[Any, ...], Tensors]:
        written = {name: buffer.clone() for name, buffer in state.buffers.items()}
        computed = narrowed(values, state.narrow)
        alpha, patterns = state.weights.alpha(computed), state.weights.patterns
        apply = bind(model, tied, alpha, state.frozen, written)
        with bound_to([layers[i] for i in lent], alpha, computed, patterns):
            data_loss, aux = loss_and_aux(loss_fn(apply, batch))
        return data_loss, aux, written

    return batch_loss
