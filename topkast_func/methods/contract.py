"""What is asked of a method, one of your own above all: the numbers and sets that it returns."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from topkast_func.checks import check_count, check_number, check_type
from topkast_func.methods.base import Entry, Method, Situation
from topkast_func.ranking import Sets
from topkast_func.sparsity import Allocation
from topkast_func.types import changed


def check_method(method: Method) -> None:
    """Check what a method says of itself.

    Args:
        method: The method.

    Raises:
        TypeError: ``starts`` returns no steps.
        ValueError: There is no such ``enters_at``, or one of the steps is below 0.
    """
    if method.enters_at not in get_args(Entry):
        known = ", ".join(map(repr, get_args(Entry)))
        raise ValueError(f"{method}.enters_at must be one of {known}, got {method.enters_at!r}")
    starts = method.starts()
    if not isinstance(starts, Sequence) or isinstance(starts, str):
        raise TypeError(f"{method}.starts() must return a tuple of steps, got {starts!r}")
    for step in starts:
        check_count(f"each of {method}.starts()", step, 0)


def allocated(method: Method, asked: Allocation, step: int) -> Allocation:
    """Return the sparsities that a method puts in force.

    Args:
        method: The method.
        asked: See `Method.sparsities`.
        step: See there.

    Returns:
        The sparsities.

    Raises:
        TypeError: It returns something else.
        ValueError: These are no fractions, or A would not be within B.
    """
    name = f"what {method}.sparsities returns at step {step}"
    found = method.sparsities(asked, step)
    check_type(name, found, Allocation)
    forward, backward = (check_number(name, number, 0.0, 1.0) for number in found)
    if backward > forward:
        raise ValueError(f"{name} must have a backward sparsity of at most {forward}, as A is in B")
    return Allocation(forward, backward)


def chosen(method: Method, situation: Situation) -> Sets:
    """Return the sets that a method chooses.

    A method of your own is given copies, and what it returns is copied: it may write to both.

    Args:
        method: The method.
        situation: What it chooses from.

    Returns:
        1_A and 1_B, of whatever sizes.

    Raises:
        ValueError: These are no two masks of the shape of the scores.
    """
    told = f"{method}.sets, for {situation.name!r},"
    own, scores = not type(method).__module__.startswith(f"{__package__}."), situation.scores
    kind = (torch.bool, scores.shape, scores.device, torch.strided)
    returned = method.sets(_copied(situation) if own else situation)
    try:
        forward, backward = returned
        found = [(mask.dtype, mask.shape, mask.device, mask.layout) for mask in (forward, backward)]
    except (TypeError, ValueError, AttributeError) as reason:
        raise ValueError(f"{told} must return two masks: {reason}") from reason
    for one in found:
        if one != kind:
            raise ValueError(f"{told} must return masks of {kind}, got {one}")
    return (forward.clone(), backward.clone()) if own else (forward, backward)


def _copied(situation: Situation) -> Situation:
    fields = situation._asdict().items()
    return changed(situation, **{key: f.clone() for key, f in fields if isinstance(f, Tensor)})


def size_problem(
    method: Method, situation: Situation, forward: int, backward: int, both: int, uneven: int = 0
) -> str | None:
    """Say what is wrong with the sizes of the sets that a method has chosen.

    Args:
        method: The method.
        situation: What it chose from.
        forward: Entries of A.
        backward: Entries of B.
        both: Entries of A that are in B.
        uneven: Groups in which A or B lacks its exact count.

    Returns:
        A sentence; None where they are right.
    """
    told, asked = f"{method}.sets, for {situation.name!r},", (situation.forward, situation.backward)
    if (forward, backward) != asked:
        found = (forward, backward)
        return f"{told} must choose {asked} entries for A and B, and has chosen {found}"
    if uneven:
        return (
            f"{told} must choose as many entries in each group of {situation.group}, and has not: "
            "`Situation.group` asks for it"
        )
    return f"{told} has chosen an A that is not part of B" if both != forward else None
