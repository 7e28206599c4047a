"""What a refresh does to the sets: how much they change, and how much has been explored."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from topkast_func.leaves import check_mask, check_present, check_shape
from topkast_func.trees import check_mask_pair, check_named, difference
from topkast_func.types import Masks, Tensors


class Exchange(NamedTuple):
    """What a refresh did to the sets of one parameter.

    Attributes:
        entered: Entries of A that were not in A before.
        promoted: Those of them that come from B∖A.
        churn: ``entered`` over the entries of A, fraction.
    """

    entered: int
    promoted: int
    churn: float


def exchanges(before: Mapping[str, Masks], after: Mapping[str, Masks]) -> dict[str, Exchange]:
    """Compare the sets before and after a refresh.

    Args:
        before: Sets by name, as `masks_of` returns them.
        after: Sets of the same parameters.

    Returns:
        What changed, by name.

    Raises:
        TypeError: The sets are not `Masks` of bool by name.
        ValueError: They are of different parameters, of other shapes, or without values.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([True, False, False]), torch.tensor([True, True, False])
        >>> new = torch.tensor([False, True, False])
        >>> exchanges({"w": Masks(a, b)}, {"w": Masks(new, b)})
        {'w': Exchange(entered=1, promoted=1, churn=1.0)}
    """
    _check_sets("before", before)
    _check_sets("after", after)
    _check_same("before", before, after)
    found = {}
    for name, new in after.items():
        old = before[name]
        check_shape(f"before[{name!r}]", old.forward, new.forward.shape, "after")
        forward, backward = (mask.to(new.forward.device) for mask in old)
        entered = new.forward & ~forward
        count = int(entered.sum())
        promoted = int((entered & backward).sum())
        found[name] = Exchange(count, promoted, count / max(1, int(new.forward.sum())))
    return found


def explored(masks: Mapping[str, Masks], earlier: Mapping[str, Tensor] | None = None) -> Tensors:
    """Add A to the entries that have ever been in A.

    Args:
        masks: The sets.
        earlier: What this function returned for the sets before; None at the start.

    Returns:
        Whether an entry was ever in A, bool, by name.

    Raises:
        TypeError: The sets are not `Masks` of bool by name, or what is earlier no tensors of bool.
        ValueError: They are of different parameters, of other shapes, or without values.
    """
    _check_sets("masks", masks)
    if earlier is not None:
        check_named("earlier", earlier)
    if earlier:
        _check_same("earlier", earlier, masks)
        for name, sets in masks.items():
            check_mask(f"earlier[{name!r}]", earlier[name], sets.forward.shape)
            check_present(f"earlier[{name!r}]", earlier[name])
    return {
        name: sets.forward | earlier[name].to(sets.forward.device)
        if earlier
        else sets.forward.clone()
        for name, sets in masks.items()
    }


def exploration_rate(explored: Mapping[str, Tensor]) -> float:
    """Return the share of weights that have ever been in A (R_s of Liu et al., ITOP, 2021).

    Args:
        explored: What `explored` returns.

    Returns:
        Fraction over all sparse parameters together; 1 where there are none.

    Raises:
        TypeError: They are no tensors of bool by name.
        ValueError: They are without values.
    """
    check_named("explored", explored)
    for name, seen in explored.items():
        check_mask(f"explored[{name!r}]", seen)
        check_present(f"explored[{name!r}]", seen)
    size = sum(seen.numel() for seen in explored.values())
    return sum(int(seen.sum()) for seen in explored.values()) / size if size else 1.0


def _check_sets(what: str, masks: Mapping[str, Masks]) -> None:
    check_named(what, masks, "Masks, as those of masks_of(state) are")
    for name, sets in masks.items():
        check_mask_pair(f"{what}[{name!r}]", sets)
        check_present(f"{what}[{name!r}]", sets.forward)


def _check_same(what: str, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if problem := difference("parameters", found, expected):
        raise ValueError(f"{what} has the sets of others: {problem}")
