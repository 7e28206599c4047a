"""The batch of a rank: how much it counts, and what stands in for an empty one."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Samples: TypeAlias = Callable[[Any], float | Tensor]
"""``samples(batch)``: how much a batch counts, such as how many tokens its loss is the mean of."""

FILLER = 2
"""Rows that the model sees of an empty batch."""


def rows(batch: Any) -> int:
    """Return how many samples a batch has: the length of the first axis of its tensors.

    Args:
        batch: A tree of tensors; those without an axis do not count.

    Returns:
        How many.

    Raises:
        ValueError: The tensors do not agree, or there are none.
    """
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    found = {leaf.shape[0] for leaf in leaves}
    if len(found) != 1:
        raise ValueError(
            f"the first axes of the tensors of the batch have lengths {sorted(found)}, so that it "
            "does not tell how many samples it has: pass make_train_step(..., samples=f), f(batch) "
            "to that number"
        )
    return found.pop()


def filled(batch: Any) -> Any:
    """Return a batch with rows of zeros where it has none: batch norm refuses one row."""
    return tree_map_only(Tensor, _filled, batch)


def _filled(tensor: Tensor) -> Tensor:
    empty = tensor.ndim > 0 and tensor.shape[0] == 0
    return tensor.new_zeros((FILLER, *tensor.shape[1:])) if empty else tensor
