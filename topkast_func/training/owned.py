"""Owners of a state: each rank has θ and the slots of the tensors that it moves, and α of all."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from topkast_func.bits import packed, unpacked
from topkast_func.config import TopKastConfig
from topkast_func.distributed.owners import Owners
from topkast_func.distributed.parallel import Found
from topkast_func.model.stand_in import StandIn
from topkast_func.penalty import Terms
from topkast_func.powerprop import theta_of
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.parted import active, compact_in, with_active
from topkast_func.training.derivative import gradient_and_value
from topkast_func.training.fits_config import check_refresh
from topkast_func.training.in_ranges import chosen_in_ranges, moved, up_to_date
from topkast_func.training.optim import (
    Optimizer,
    OptimizerState,
    Rate,
    global_norm,
    summed_by,
    updated,
)
from topkast_func.training.refresh import Choice, refreshed
from topkast_func.training.split import at_rest
from topkast_func.training.state import Part, TrainState
from topkast_func.training.update import Moved, batch_loss_of
from topkast_func.types import LossFn, Masks, Model, Params, Tensors, changed

OfBatch: TypeAlias = tuple[Tensor, tuple[tuple[Any, ...], Tensors]]
"""The data loss; beside it what else the loss function returned, and the buffers."""

Beyond: TypeAlias = tuple[Tensor, Tensor]
"""What has the gradient that is beyond that of the data loss, and the penalty."""


def owned_update_of(
    model: Model,
    loss_fn: LossFn,
    config: TopKastConfig,
    terms: Terms,
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
        weights = compact_in(state.weights)

        def powered(values: Tensors) -> Tensors:
            return values | {name: theta_of(values[name], config.powerprop) for name in phi}

        def of_batch(theta: Tensors) -> OfBatch:
            data_loss, aux, written = batch_loss(lent, state, batch, theta)
            return data_loss, (aux, written)

        def beyond(grads: Tensors, own: Tensors) -> Beyond:
            theta = powered(own)
            starts = {name: ranks.span(name, values[name].numel())[0] for name in state.split}
            penalty = weights.penalty(theta, terms, starts)
            linear = sum((grads[name] * theta[name]).sum() for name in weights.sparse_names)
            return linear + config.penalty_weight * penalty, penalty

        with torch.no_grad():
            values = weights.values
            grads, (data_loss, (aux, written)) = gradient_and_value(of_batch, powered(values))
            found = Found(grads, data_loss, aux, written)
            grads, data_loss, aux, written = ranks.whole(share, found, state.buffers)
            own = ranks.own(values)
            further, (_, penalty) = gradient_and_value(partial(beyond, grads), own)
            grads |= {name: further[name] for name in weights.sparse_names}
            penalty = ranks.total(penalty)
            rate = tree_map(lambda given: given.reshape(()), lr)
            slots = _present(state, optimizer.init(own).slots)
            with summed_by(ranks.total):
                before = OptimizerState(state.optimizer.step, slots)
                updates, after_slots = updated(optimizer, grads, before, own, rate)
                norm = global_norm(grads)
            held = ranks.put({name: v + updates[name] for name, v in own.items()}, values)
            after = changed(
                state,
                weights=_shared(ranks, changed(weights, values=held)),
                buffers=written,
                optimizer=changed(
                    state.optimizer, slots=_kept(state.optimizer.slots, after_slots.slots)
                ),
                split=_parts(state.split, after_slots.slots),
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
    ranges: Tensors = {}

    def agreed(choose: Callable[[], Choice]) -> Choice:
        theta, own = ranks.ranks.attempted(choose)
        of_ranges = chosen_in_ranges(ranks.ranks, state, config, up_to_date(ranks.ranks, state))
        ranges.update(of_ranges[0])
        shapes, own = state.weights.shapes(), own | of_ranges[1]
        sets = {name: _sets(ranks, name, shapes[name], own) for name in state.weights.sparse_names}
        return theta, sets

    after = moved(ranks.ranks, state, refreshed(state, config, gradients, agreed), ranges)
    ranks.rested(at_rest(after), int(after.step))
    return changed(after, weights=_shared(ranks, compact_in(after.weights)))


def _sets(ranks: Owners, name: str, shape: torch.Size, own: dict[str, Masks]) -> Masks:
    """Return the sets of a parameter, sent as bits by its owner, or by each rank its range."""
    parts = []
    for rank, (start, stop) in enumerate(pairwise(ranks.bounds(name, shape.numel()))):
        if start == stop:
            continue
        if rank == ranks.rank:
            bits = torch.stack([packed(mask) for mask in own[name]])
        else:
            bits = torch.empty(2, -(-(stop - start) // 8), dtype=torch.uint8, device="cpu")
        sent, size = ranks.ranks.sent(rank, bits), torch.Size([stop - start])
        parts.append(torch.stack([unpacked(mask, size) for mask in sent]))
    return Masks(*torch.cat(parts, 1).view(2, *shape))


def _shared(ranks: Owners, weights: CompactWeights) -> CompactWeights:
    """Return weights with what the forward pass reads as the owners have it."""
    return with_active(weights, ranks.shared(active(weights), weights.values))


def _present(state: TrainState, empty: dict[str, Tensors]) -> dict[str, Tensors]:
    """Return the slots that are here, with empty ones in the place of those of other ranks."""
    here = {
        kind: {n: empty[kind][n] if slot.is_meta else slot for n, slot in tree.items()}
        for kind, tree in state.optimizer.slots.items()
    }
    for name, part in state.split.items():
        for kind, slot in part.slots.items():
            here[kind][name] = slot
    return here


def _parts(before: dict[str, Part], after: dict[str, Tensors]) -> dict[str, Part]:
    """Return the parts of this rank with their slots after a step."""
    return {
        name: changed(part, slots={kind: after[kind][name] for kind in part.slots})
        for name, part in before.items()
    }


def _kept(before: dict[str, Tensors], after: dict[str, Tensors]) -> dict[str, Tensors]:
    """Return the slots after a step, those of other ranks on the meta device as before."""
    return {
        kind: {n: before[kind][n] if before[kind][n].is_meta else slot for n, slot in tree.items()}
        for kind, tree in after.items()
    }
