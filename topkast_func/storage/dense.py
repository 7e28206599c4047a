"""Dense storage: θ and boolean masks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from topkast_func.kernels.pattern import Pattern
from topkast_func.model.alpha import straight_through_all
from topkast_func.penalty import Terms, masked_parts, summed_penalty
from topkast_func.places import sizes_of
from topkast_func.storage.index import note
from topkast_func.types import Masks, Params, Tensors


class DenseWeights(NamedTuple):
    """`Weights`, stored densely.

    Attributes:
        theta: θ by name.
        sets: Sets of the sparse parameters by name.
    """

    theta: Tensors
    sets: dict[str, Masks]

    @property
    def values(self) -> Tensors:
        """θ."""
        return self.theta

    @property
    def patterns(self) -> dict[str, Pattern]:
        """None: kernels compute with no mask."""
        return {}

    @property
    def sparse_names(self) -> tuple[str, ...]:
        """Names of the sparse parameters."""
        return tuple(self.sets)

    @property
    def set_tensors(self) -> list[Tensor]:
        """The masks."""
        return [mask for masks in self.sets.values() for mask in masks]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every parameter."""
        return {name: theta.shape for name, theta in self.theta.items()}

    def index_of(self, name: str) -> None:
        """Return None."""

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return |A| and |B|."""
        return sizes_of(self.sets)

    def alpha(self, values: Tensors) -> Tensors:
        """Return α."""
        return straight_through_all(values, self.sets)

    def forward(self) -> Tensors:
        """Return α of θ."""
        return self.alpha(self.theta)

    def dense(self) -> Tensors:
        """Return θ."""
        return self.theta

    def masks(self) -> dict[str, Masks]:
        """Return A and B."""
        return self.sets

    def penalty(self, values: Tensors, terms: Terms) -> Tensor:
        """Return the exploration penalty."""

        def parts(name: str) -> tuple[Tensor, Tensor]:
            return masked_parts(values[name], self.sets[name])

        return summed_penalty(terms, parts, next(iter(values.values())).device)

    def add(self, updates: Tensors) -> "DenseWeights":
        """Add updates on B."""
        theta = {
            name: torch.where(self.sets[name].backward, old + updates[name], old)
            if name in self.sets
            else old + updates[name]
            for name, old in self.theta.items()
        }
        return DenseWeights(theta, self.sets)

    def mask_slots(self, slots: dict[str, Tensors]) -> dict[str, Tensors]:
        """Set optimiser slots to zero outside B."""

        def within(name: str, slot: Tensor) -> Tensor:
            if name not in self.sets or slot.shape != self.theta[name].shape:
                return slot
            return torch.where(self.sets[name].backward, slot, slot.new_zeros(()))

        return {k: {n: within(n, slot) for n, slot in tree.items()} for k, tree in slots.items()}

    def reindexed(
        self,
        dense: Params,
        masks: Mapping[str, Masks],
        slots: dict[str, Tensors],
        sizes: Mapping[str, tuple[int, int]],
    ) -> tuple["DenseWeights", dict[str, Tensors]]:
        """Take over new sets."""
        weights = dense_weights(dict(dense), dict(masks))
        return weights, weights.mask_slots(slots)


def dense_weights(theta: Tensors, sets: dict[str, Masks]) -> DenseWeights:
    """Store weights densely.

    Args:
        theta: θ by name.
        sets: Sets that were chosen here, by name.

    Returns:
        The weights.
    """
    for masks in sets.values():
        note(masks, (1, 1), masks.forward.shape)
    return DenseWeights(theta, sets)
