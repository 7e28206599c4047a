"""A refresh of parameters that all ranks divide.

Their ranges of θ are brought up to date and ranked together; then the values and slots of the new B
go to whoever moves them.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from topkast_func.config import TopKastConfig
from topkast_func.distributed.division import Bounds, cut, part_of, piece, placed
from topkast_func.distributed.owners import from_owners
from topkast_func.distributed.ranges import top_over
from topkast_func.distributed.ranks import Ranks
from topkast_func.entry import entered
from topkast_func.methods.base import Situation
from topkast_func.model.alpha import split
from topkast_func.ranking import magnitudes, ranked_by
from topkast_func.storage.index import carry, old_slots
from topkast_func.storage.parted import compact_in
from topkast_func.training.readout import powered
from topkast_func.training.refresh import sizes_after
from topkast_func.training.split import joined_flat, joined_values, places_in
from topkast_func.training.state import TrainState
from topkast_func.types import Masks, Tensors, changed


def up_to_date(ranks: Ranks, state: TrainState) -> Tensors:
    """Return the ranges of θ of this rank by name, with the values of B; a collective call."""
    found = {}
    for name, values in joined_values(ranks, state).items():
        found[name] = own = state.split[name].theta.clone()
        for part, here in _within(ranks, state, name):
            own[here.to(own.device)] = values[part].to(own.device)
    return found


def chosen_in_ranges(
    ranks: Ranks, state: TrainState, config: TopKastConfig, ranges: Tensors
) -> tuple[Tensors, dict[str, Masks]]:
    """Choose the sets of what is split, as `chosen_anew` does of the whole; a collective call.

    Args:
        ranks: The processes.
        state: The state of this rank.
        config: See `refresh`.
        ranges: What `up_to_date` returns.

    Returns:
        The ranges, with what entered A as it starts, and the sets in them.

    Raises:
        NaNParameterError: A range holds NaN; on every rank.
    """
    step, method, weights = int(state.step), config.method, compact_in(state.weights)
    sizes, settled = sizes_after(weights, config, step), config.schedule.settled(step)
    after, sets = dict(ranges), {}
    for name, own in ranges.items():
        old = _sets_within(ranks, state, name)
        if settled:
            sets[name] = Masks(old.forward, old.forward.clone())
            continue
        exponents = {name: state.exponents[name]} if name in state.exponents else {}
        theta = powered({name: own}, exponents)[name]
        situation = Situation(
            name,
            magnitudes(name, theta, (1, 1), "l2"),
            *sizes[name],
            active=old.forward if method.reads_sets else None,
            gradient=None,
            progress=0.0,
            generator=torch.Generator("cpu"),
            held=weights.sets(name).active_count,
        )
        start, _ = part_of(weights.theta[name].numel(), ranks.rank, ranks.size)
        with ranked_by(partial(top_over, ranks, start)):
            sets[name] = Masks(*method.sets(situation))
        after[name] = entered(
            name,
            own,
            old,
            sets[name],
            method.enters_at,
            exponent=float(exponents.get(name, 1.0)),
            least=lambda scores: ranks.reduced(scores.min(), dist.ReduceOp.MIN),
        )
    return after, sets


def moved(ranks: Ranks, before: TrainState, after: TrainState, ranges: Tensors) -> TrainState:
    """Give each rank the values and slots of what is split, after new sets; a collective call.

    Args:
        ranks: The processes.
        before: The state with the old sets.
        after: That with the new ones, and zeros for the values of what is split.
        ranges: θ in the ranges.

    Returns:
        The state after.
    """
    weights, parts = compact_in(after.weights), dict(after.split)
    held = dict(weights.values)
    for name, own in ranges.items():
        (old, size), (new, _) = places_in(before, name), places_in(after, name)
        count = weights.sets(name).active_count
        first, rest = (_from_ranges(ranks, own, size, part) for part in (new[:count], new[count:]))
        begin, end = part_of(new.numel(), ranks.rank, ranks.size)
        mine = piece(torch.cat([first, rest]), begin, end)
        held[name] = placed(mine, begin, end, torch.cat([first, torch.zeros_like(rest)]))
        source = old_slots(old, piece(new, begin, end), size)
        slots = {
            kind: carry(joined_flat(ranks, slot, old.numel()), source)
            for kind, slot in parts[name].slots.items()
        }
        parts[name] = changed(parts[name], theta=own, slots=slots)
    return changed(after, weights=changed(weights, values=held), split=parts)


def _sets_within(ranks: Ranks, state: TrainState, name: str) -> Masks:
    """Return the sets of a parameter as they are, in the range of this rank."""
    own = state.split[name].theta
    mask, masks = torch.zeros(own.shape, dtype=torch.bool, device=own.device), []
    for _, here in _within(ranks, state, name):
        mask = mask.index_fill(0, here.to(own.device), True)
        masks.append(mask)
    return Masks(*masks)


def _within(ranks: Ranks, state: TrainState, name: str) -> list[tuple[slice, Tensor]]:
    """Return which values of A and of B∖A are in the range of this rank, and where in it."""
    places, size = places_in(state, name)
    start, stop = part_of(size, ranks.rank, ranks.size)
    count, found = compact_in(state.weights).sets(name).active_count, []
    for first, part in ((0, places[:count]), (count, places[count:])):
        bounds = torch.tensor([start, stop], device=part.device)
        low, high = torch.searchsorted(part, bounds).tolist()
        found.append((slice(first + low, first + high), part[low:high] - start))
    return found


def _from_ranges(ranks: Ranks, own: Tensor, size: int, places: Tensor) -> Tensor:
    """Return what stands at ascending places of θ, of which each rank has a range."""
    start, _ = part_of(size, ranks.rank, ranks.size)
    cuts = torch.tensor(cut(size, ranks.size)[1:-1], device=places.device)
    bounds: Bounds = (0, *torch.searchsorted(places, cuts).tolist(), places.numel())
    first, last = bounds[ranks.rank : ranks.rank + 2]
    found = split(own, (places[first:last] - start).to(own.device)).to(places.device)
    whole = placed(found, first, last, found.new_zeros(places.shape))
    return from_owners(ranks, [bounds], [whole])[0]
