"""States of either storage, read in one way."""

import torch
from torch import Tensor

import topkast_func as tk
from tests.reference import stored_order

STORAGES = ["compact", "dense"]


def dense_slots(state: tk.TrainState) -> dict[str, dict[str, Tensor]]:
    """Spread the optimiser slots of a state over θ, with zeros outside B.

    Unused places, which B∖A leaves once B has become A, must hold zeros.
    """
    theta, masks = tk.dense_params(state), tk.masks_of(state)
    found: dict[str, dict[str, Tensor]] = {}
    for kind, tree in state.optimizer.slots.items():
        found[kind] = {}
        for name, slot in tree.items():
            spread = name in masks and slot.shape != theta[name].shape
            found[kind][name] = _spread(slot, theta[name], masks[name]) if spread else slot
    return found


def _spread(slot: Tensor, theta: Tensor, masks: tk.Masks) -> Tensor:
    block = (slot.shape[1], slot.shape[2]) if slot.ndim == 3 else (1, 1)
    forward, backward = (mask.view(theta.shape[0], -1).numpy() for mask in masks)
    places = torch.tensor(stored_order(forward, backward, block)).flatten()
    stored = slot.flatten()
    assert not stored[len(places) :].any()
    dense = theta.new_zeros(theta.numel(), dtype=slot.dtype)
    dense[places] = stored[: len(places)]
    return dense.view(theta.shape)
