"""Tensors in a checkpoint of which each rank writes a part, under a name of its own."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from topkast_func.distributed.division import part_of
from topkast_func.distributed.ranks import Ranks
from topkast_func.training.state import TrainState
from topkast_func.training.stored import check_numbers, slots_tree
from topkast_func.types import Tensors

SPLIT = "split"
"""What the header says of them: how many ranks there were, the shapes of the whole by name, and the
names of all tensors in their order."""


def with_pieces(
    ranks: Ranks, state: TrainState, ranges: Tensors, header: dict[str, Any], tensors: Tensors
) -> tuple[dict[str, Any], Tensors]:
    """Put the parts of this rank in the place of what is split.

    Args:
        ranks: The processes.
        state: The state of this rank.
        ranges: θ by name in the ranges of this rank, up to date.
        header: What `taken_apart` returns.
        tensors: What it returns beside it, on the meta device what is split.

    Returns:
        The header and the tensors, on the meta device the parts of others; both as they were where
        nothing is split.

    Raises:
        ValueError: A range holds NaN.
    """
    if not state.split:
        return header, tensors
    check_numbers(ranges)
    own, shapes = dict(_own(state, ranges)), {}
    kept = {key: tensor for key, tensor in tensors.items() if key not in own}
    for key, part in own.items():
        size, shapes[key] = tensors[key].numel(), list(tensors[key].shape)
        for rank in range(ranks.size):
            start, stop = part_of(size, rank, ranks.size)
            other = torch.empty(stop - start, dtype=part.dtype, device="meta")
            kept[_name(rank, key)] = part if rank == ranks.rank else other
    told = {"ranks": ranks.size, "shapes": shapes, "order": list(tensors)}
    return header | {SPLIT: told}, kept


def without_pieces(header: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Put tensors together of the parts that ranks have written.

    Args:
        header: The header.
        tensors: The tensors, parts among them.

    Returns:
        The tensors, whole.

    Raises:
        ValueError: The parts are not those that the header tells of.
    """
    if SPLIT not in header:
        return tensors
    whole = dict(tensors)
    try:
        ranks = range(header[SPLIT]["ranks"])
        for key, shape in header[SPLIT]["shapes"].items():
            parts = [whole.pop(_name(rank, key)) for rank in ranks]
            whole[key] = torch.cat(parts).view(shape)
        return {key: whole[key] for key in header[SPLIT]["order"]}
    except (KeyError, TypeError, AttributeError, RuntimeError) as reason:
        raise ValueError(f"its parts are not what its {SPLIT} tells of: {reason!r}") from reason


def _own(state: TrainState, ranges: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, part in state.split.items():
        if name in ranges:
            yield f"theta/{name}", ranges[name]
        for kind, slot in part.slots.items():
            yield f"{slots_tree(kind)}/{name}", slot


def _name(rank: int, key: str) -> str:
    return f"parts/{rank}/{key}"
