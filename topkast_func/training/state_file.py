"""A state as a JSON header and tensors by name, and back."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from topkast_func.block_masks import is_of_blocks
from topkast_func.files.packing import packed_sets
from topkast_func.places import sizes_of
from topkast_func.storage.compact import CompactWeights, compact
from topkast_func.storage.dense import DenseWeights
from topkast_func.storage.weights import Weights
from topkast_func.training.optim import OptimizerState
from topkast_func.training.readout import masks_of
from topkast_func.training.state import TrainState
from topkast_func.training.stored import COUNTERS, StoredState, check_numbers, slots_tree
from topkast_func.types import Masks, Tensors


def flattened(state: TrainState) -> tuple[dict[str, Any], Tensors]:
    """Take a state apart; see `save` for what is in which part.

    Args:
        state: The state.

    Returns:
        The header and the tensors, on the meta device what other ranks own.

    Raises:
        ValueError: θ holds NaN, or A is not within B.
    """
    weights = state.weights
    header: dict[str, Any] = {
        "storage": "dense",
        "layers": list(weights.patterns),
        "slots": list(state.optimizer.slots),
    }
    if isinstance(weights, CompactWeights):
        values = {name: list(weights.values[name].shape) for name in weights.sparse_names}
        header |= {"storage": "compact", "values": values}
    return header, dict(_named(state))


def _named(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    counters = (state.step, state.seed, state.mask_seed, state.optimizer.step)
    yield from zip(COUNTERS, counters, strict=True)
    theta = state.weights.dense()
    check_numbers({name: weight for name, weight in theta.items() if not weight.is_meta})
    sets = {name: packed_sets(name, masks) for name, masks in masks_of(state).items()}
    trees: dict[str, Mapping[str, Tensor]] = {
        "theta": theta,
        "backward": {name: masks.backward for name, masks in sets.items()},
        "forward": {name: masks.forward for name, masks in sets.items()},
        "buffers": state.buffers,
        "frozen": state.frozen,
        "exponents": state.exponents,
        "narrow": state.narrow,
        **{slots_tree(kind): tree for kind, tree in state.optimizer.slots.items()},
    }
    for tree, tensors in trees.items():
        for name, tensor in tensors.items():
            yield f"{tree}/{name}", tensor


def block_problem(file: StoredState, block_shape: tuple[int, int]) -> str | None:
    """Say where the sets of a file are not made of blocks of a shape."""
    for name, shape in (file.values or {}).items():
        found = tuple(shape[1:]) or (1, 1)
        if found != (block_shape if name in file.layers else (1, 1)):
            return f"{name!r} has blocks of {found}, the configuration asks for {block_shape}"
    for name, masks in file.masks.items():
        if not all(is_of_blocks(mask, block_shape) for mask in masks):
            return f"the sets of {name!r} are not made of blocks of {block_shape}"
    return None


def restored(
    file: StoredState,
    block_shape: tuple[int, int],
    device: torch.device | str,
    theta_device: torch.device | str | None,
) -> TrainState:
    """Put a state together.

    Args:
        file: Its parts.
        block_shape: (r, c) of the blocks that its sets are made of.
        device: Where the tensors go; counters and exponents stay on the CPU.
        theta_device: Where θ rests in compact storage; None for ``device``.

    Returns:
        The state.
    """

    def moved(tree: Tensors) -> Tensors:
        return {name: tensor.to(device) for name, tensor in tree.items()}

    theta = moved(file.theta)
    masks = {n: Masks(*(mask.to(device) for mask in both)) for n, both in file.masks.items()}
    weights: Weights = DenseWeights(theta, masks)
    if file.values is not None:
        places = {name: shape[0] for name, shape in file.values.items()}
        weights = compact(
            theta, masks, sizes_of(masks), file.layers, block_shape, theta_device, places
        )
    slots = {kind: moved(tree) for kind, tree in file.slots.items()}
    return TrainState(
        step=file.counters["step"],
        seed=file.counters["seed"],
        mask_seed=file.counters["mask_seed"],
        weights=weights,
        buffers=moved(file.buffers),
        frozen=moved(file.frozen),
        optimizer=OptimizerState(file.counters["optimizer_step"], slots),
        exponents=file.exponents,
        narrow=moved(file.narrow),
    )
