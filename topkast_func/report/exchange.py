"""What a refresh does to the sets: how much they change, and how much has been explored."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

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

    Example:
        >>> import torch
        >>> a, b = torch.tensor([True, False, False]), torch.tensor([True, True, False])
        >>> new = torch.tensor([False, True, False])
        >>> exchanges({"w": Masks(a, b)}, {"w": Masks(new, b)})
        {'w': Exchange(entered=1, promoted=1, churn=1.0)}
    """
    found = {}
    for name, new in after.items():
        old = before[name]
        entered = new.forward & ~old.forward
        count = int(entered.sum())
        promoted = int((entered & old.backward).sum())
        found[name] = Exchange(count, promoted, count / int(new.forward.sum()))
    return found


def explored(masks: Mapping[str, Masks], earlier: Mapping[str, Tensor] | None = None) -> Tensors:
    """Add A to the entries that have ever been in A.

    Args:
        masks: The sets.
        earlier: What this function returned for the sets before; None at the start.

    Returns:
        Whether an entry was ever in A, bool, by name.
    """
    return {
        name: sets.forward | earlier[name] if earlier else sets.forward.clone()
        for name, sets in masks.items()
    }


def exploration_rate(explored: Mapping[str, Tensor]) -> float:
    """Return the share of weights that have ever been in A (R_s of Liu et al., ITOP, 2021).

    Args:
        explored: What `explored` returns.

    Returns:
        Fraction over all sparse parameters together; 1 where there are none.
    """
    size = sum(seen.numel() for seen in explored.values())
    return sum(int(seen.sum()) for seen in explored.values()) / size if size else 1.0
