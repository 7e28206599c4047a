"""Owners of a state: each rank has θ and the slots of the tensors that it moves, and α of all.

On the meta device is what other ranks own. So a state tells by itself which part of it is here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from topkast_func.bits import packed, unpacked
from topkast_func.config import TopKastConfig
from topkast_func.distributed.owners import Owners
from topkast_func.distributed.parallel import Found
from topkast_func.model.stand_in import StandIn
from topkast_func.powerprop import theta_of
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.parted import active, with_active, without
from topkast_func.training.derivative import gradient_and_value
from topkast_func.training.fits_config import check_refresh
from topkast_func.training.optim import (
    Optimizer,
    OptimizerState,
    Rate,
    global_norm,
    summed_by,
    updated,
)
from topkast_func.training.refresh import Choice, refreshed
from topkast_func.training.state import TrainState, Weights, elsewhere
from topkast_func.training.update import Moved, batch_loss_of
from topkast_func.types import LossFn, Masks, Model, Params, Tensors, changed

OfBatch: TypeAlias = tuple[Tensor, tuple[tuple[Any, ...], Tensors]]
"""The data loss; beside it what else the loss function returned, and the buffers."""

Beyond: TypeAlias = tuple[Tensor, Tensor]
"""What has the gradient that is beyond that of the data loss, and the penalty."""

DENSE = (
    "shard='owners' takes compact storage: in dense storage each rank computes with all of θ, "
    "which owners are to spare it"
)
FOREIGN = (
    "this rank is to own {}, and the state has not: it is the part of another rank, or of another "
    "group; begin with a whole state, such as gather(state, process_group) returns"
)


def part(ranks: Owners, state: TrainState) -> TrainState:
    """Return the part of a state that a rank has, which may be the state already.

    Args:
        ranks: The processes.
        state: The state, whole or that part.

    Returns:
        The part: θ and slots of what other ranks own are on the meta device.

    Raises:
        ValueError: It is the part of another rank, or in dense storage.
    """
    weights = _compact(state)
    others = ranks.divide({name: shape.numel() for name, shape in weights.shapes().items()})
    away = elsewhere(state)
    if lost := [name for name in away if name not in others]:
        raise ValueError(FOREIGN.format(lost))
    held = {*weights.theta} | {n for tree in state.optimizer.slots.values() for n in tree}
    if len(away) == len(others & held):
        return state
    slots = {
        kind: {n: slot.to("meta") if n in others else slot for n, slot in tree.items()}
        for kind, tree in state.optimizer.slots.items()
    }
    return changed(
        state, weights=without(weights, others), optimizer=changed(state.optimizer, slots=slots)
    )


def sent_by_owners(weights: Weights) -> Tensors:
    """Return what owners send of weights in compact storage: what the forward pass reads.

    Args:
        weights: The weights, without values too.

    Returns:
        Tensors by name.

    Raises:
        ValueError: They are in dense storage.
    """
    if not isinstance(weights, CompactWeights):
        raise ValueError(DENSE)
    return active(weights)


def compared(ranks: Owners, state: TrainState) -> TrainState:
    """Return what ranks compare of their parts, once what they alone have at rest is as it was.

    Values of B∖A and slots change at every step, by their owner alone: nothing checks them.

    Args:
        ranks: The processes.
        state: The part of this rank.

    Returns:
        The part with what all ranks read of the values, and checksums in the place of θ at rest.

    Raises:
        RuntimeError: θ at rest has changed; on every rank.
    """
    weights = _compact(state)
    sums = ranks.rested(weights.theta, int(state.step))
    return changed(state, weights=changed(weights, held=active(weights), theta=sums))


def owned_update_of(
    model: Model,
    loss_fn: LossFn,
    config: TopKastConfig,
    start: int,
    optimizer: Optimizer,
    layers: Sequence[StandIn],
    ranks: Owners,
) -> Callable[..., Moved]:
    """Return what `update_of` does, on the part of a rank.

    Gradients with respect to θ of A and B∖A go to the owners, who alone know θ of B∖A: they add
    the penalty, take the derivative of powerpropagation, and send what all need for α.
    """
    batch_loss = batch_loss_of(model, loss_fn, layers)

    def step(
        lent: tuple[int, ...],
        phi: tuple[str, ...],
        state: TrainState,
        batch: Any,
        lr: Rate,
        share: Tensor,
    ) -> Moved:
        weights = _compact(state)

        def powered(values: Tensors) -> Tensors:
            return values | {name: theta_of(values[name], config.powerprop) for name in phi}

        def of_batch(theta: Tensors) -> OfBatch:
            data_loss, aux, written = batch_loss(lent, state, batch, theta)
            return data_loss, (aux, written)

        def beyond(grads: Tensors, own: Tensors) -> Beyond:
            theta = powered(own)
            penalty = weights.penalty(theta, config, start)
            linear = sum((grads[name] * theta[name]).sum() for name in weights.sparse())
            return linear + config.penalty_weight * penalty, penalty

        with torch.no_grad():
            values = weights.values()
            grads, (data_loss, (aux, written)) = gradient_and_value(of_batch, powered(values))
            found = Found(grads, data_loss, aux, written)
            grads, data_loss, aux, written = ranks.whole(share, found, state.buffers)
            own = ranks.own(values)
            further, (_, penalty) = gradient_and_value(partial(beyond, grads), own)
            grads |= {name: further[name] for name in weights.sparse()}
            penalty = ranks.total(penalty)
            rate = tree_map(lambda given: given.reshape(()), lr)
            slots = _present(state.optimizer.slots, optimizer.init(own).slots)
            with summed_by(ranks.total):
                before = OptimizerState(state.optimizer.step, slots)
                updates, moved = updated(optimizer, grads, before, own, rate)
                norm = global_norm(grads)
            held = {n: v + updates[n] if ranks.owns(n) else values[n] for n, v in own.items()}
            after = changed(
                state,
                weights=_shared(ranks, changed(weights, held=held)),
                buffers=written,
                optimizer=changed(state.optimizer, slots=_kept(state.optimizer.slots, moved.slots)),
            )
            loss = data_loss + config.penalty_weight * penalty
        return after, (loss, data_loss, penalty, norm), tree_map(torch.clone, aux)

    return step


def refresh_by_owners(
    ranks: Owners, state: TrainState, config: TopKastConfig, gradients: Params | None
) -> TrainState:
    """Choose A and B anew, each of the ranks those of what it owns; a collective call.

    Args:
        ranks: The processes.
        state: The part of this rank.
        config: See `refresh`.
        gradients: See `refresh`.

    Returns:
        The part, with its new sets.
    """
    check_refresh(state, config)

    def agreed(choose: Callable[[], Choice]) -> Choice:
        theta, own = ranks.ranks.attempted(choose)
        shapes = state.weights.shapes()
        sets = {name: _sets(ranks, name, shapes[name], own) for name in state.weights.sparse()}
        return theta, sets

    after = refreshed(state, config, gradients, agreed)
    weights = _compact(after)
    ranks.rested(weights.theta, int(after.step))
    return changed(after, weights=_shared(ranks, weights))


def _sets(ranks: Owners, name: str, shape: torch.Size, own: dict[str, Masks]) -> Masks:
    """Return the sets of a parameter, sent as bits by its owner."""
    if name in own:
        bits = torch.stack([packed(mask) for mask in own[name]])
    else:
        bits = torch.empty(2, -(-shape.numel() // 8), dtype=torch.uint8, device="cpu")
    sent = ranks.ranks.sent(ranks.owners[name], bits)
    return Masks(*(unpacked(mask, shape) for mask in sent))


def _shared(ranks: Owners, weights: CompactWeights) -> CompactWeights:
    """Return weights with what the forward pass reads as the owners have it."""
    return with_active(weights, ranks.shared(active(weights)))


def _compact(state: TrainState) -> CompactWeights:
    if not isinstance(state.weights, CompactWeights):
        raise ValueError(DENSE)
    return state.weights


def _present(slots: dict[str, Tensors], empty: dict[str, Tensors]) -> dict[str, Tensors]:
    """Return slots, with empty ones in the place of those of other ranks."""
    return {
        kind: {n: empty[kind][n] if slot.is_meta else slot for n, slot in tree.items()}
        for kind, tree in slots.items()
    }


def _kept(before: dict[str, Tensors], after: dict[str, Tensors]) -> dict[str, Tensors]:
    """Return the slots after a step, those of other ranks on the meta device as before."""
    return {
        kind: {n: before[kind][n] if before[kind][n].is_meta else slot for n, slot in tree.items()}
        for kind, tree in after.items()
    }
