"""Slots of optimisers: how they begin, which is how they are outside B."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Adagrad, Optimizer, Rprop

from topkast_func.bits import unpacked

FIRST_VALUES = {(Adagrad, "sum"): "initial_accumulator_value", (Rprop, "step_size"): "lr"}
"""What a slot of a fresh parameter holds, of optimisers whose slots begin at neither 0 nor θ."""

EMPTY = frozenset(
    {"acc_delta", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq"}
    | {"momentum_buffer", "square_avg"}
)
"""Slots that begin at 0 with whoever has them: the first one of a gradient to which weight decay
has added θ may look like one that follows θ."""

_FOLLOWING: "WeakKeyDictionary[Optimizer, dict[str, bool]]" = WeakKeyDictionary()
"""Which slots hold about what θ does, as copies and running means of it do."""


def slots_of(optimizer: Optimizer, theta: Tensor) -> dict[str, Tensor]:
    """Return the slots of a weight that have an entry for each of it, in memory of their own.

    Args:
        optimizer: The optimiser.
        theta: The weight.

    Returns:
        The slots by name. An optimiser may have put one into the place of the data of the weight,
        as one does that gives back weights which it had moved (SAM): that is none.
    """
    place = _place(theta)
    return {
        name: slot
        for name, slot in optimizer.state.get(theta, {}).items()
        if isinstance(slot, Tensor) and slot.shape == theta.shape and slot.is_floating_point()
        if _place(slot) != place
    }


def as_it_begins(
    name: str,
    slot: Tensor,
    theta: Tensor,
    inside: Tensor,
    optimizer: Optimizer,
    group: Mapping[str, Any],
) -> Tensor | None:
    """Return the slot of a parameter that has made no step yet.

    Args:
        name: Name of the slot.
        slot: The slot after a step.
        theta: The weight, which outside B is as it was before the step.
        inside: B in bits.
        optimizer: The optimiser.
        group: The group of it that the weight is in.

    Returns:
        The slot; None for 0.
    """
    keys = [
        key
        for (kind, slot_name), key in FIRST_VALUES.items()
        if slot_name == name and isinstance(optimizer, kind)
    ]
    if keys:
        first = float(group[keys[0]])
        return torch.full_like(slot, first) if first else None
    if name in EMPTY:
        return None
    known = _FOLLOWING.setdefault(optimizer, {})
    if name not in known and (found := _follows(slot, theta, inside)) is not None:
        known[name] = found
    return theta.to(slot.dtype).contiguous() if known.get(name) else None


def _follows(slot: Tensor, theta: Tensor, inside: Tensor) -> bool | None:
    """Return whether a slot is near θ outside B, where no gradient is; None where θ is 0 there."""
    told = ~unpacked(inside, theta.shape) & (theta != 0)
    near = told & ((slot - theta).abs() <= theta.abs() / 2)
    count, nearby = torch.stack([told.sum(), near.sum()]).tolist()
    return None if count == 0 else 2 * nearby > count


def _place(tensor: Tensor) -> int | None:
    return None if tensor.is_meta else tensor.data_ptr()
