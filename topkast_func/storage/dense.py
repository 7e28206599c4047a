"""Dense storage: θ and boolean masks."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from topkast_func.config import TopKastConfig
from topkast_func.kernels.pattern import Pattern
from topkast_func.model.alpha import straight_through_all
from topkast_func.penalty import masked_parts, summed_penalty
from topkast_func.places import sizes_of
from topkast_func.types import Masks, Params, Tensors


class DenseWeights(NamedTuple):
    """The weights of a state, stored densely.

    Attributes:
        theta: θ by name.
        sets: Sets of the sparse parameters by name.
    """

    theta: Tensors
    sets: dict[str, Masks]

    def values(self) -> Tensors:
        """Return what is differentiated and updated; optimiser slots have its shapes."""
        return self.theta

    def alpha(self, values: Tensors) -> Tensors:
        """Return what the model computes with.

        Args:
            values: The values.

        Returns:
            α by name, with the gradient of the identity on B.
        """
        return straight_through_all(values, self.sets)

    def layers(self) -> dict[str, Pattern]:
        """Return the sets of the parameters that kernels can compute: of none."""
        return {}

    def sparse(self) -> tuple[str, ...]:
        """Return the names of the sparse parameters."""
        return tuple(self.sets)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every parameter."""
        return {name: theta.shape for name, theta in self.theta.items()}

    def stands(self, name: str) -> None:
        """Return None: every value stands at its own place in θ."""

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return how many entries A and B have, by name."""
        return sizes_of(self.sets)

    def sets_key(self) -> Hashable:
        """Return a key that changes with the sets, without counting them."""
        return tuple((name, id(masks.forward)) for name, masks in self.sets.items())

    def dense(self) -> Tensors:
        """Return θ."""
        return self.theta

    def forward(self) -> Tensors:
        """Return α."""
        return self.alpha(self.theta)

    def masks(self) -> dict[str, Masks]:
        """Return A and B."""
        return self.sets

    def penalty(self, values: Tensors, config: TopKastConfig, step: int) -> Tensor:
        """Return the exploration penalty of ``values``; see `exploration_penalty`."""

        def parts(name: str) -> tuple[Tensor, Tensor]:
            return masked_parts(values[name], self.sets[name])

        shapes = {name: self.theta[name].shape for name in self.sets}
        device = next(iter(values.values())).device
        return summed_penalty(shapes, parts, config, device, step)

    def moved(self, updates: Tensors) -> "DenseWeights":
        """Add ``updates`` on B, leaving every other entry as it is, bit for bit."""
        theta = {
            name: torch.where(self.sets[name].backward, old + updates[name], old)
            if name in self.sets
            else old + updates[name]
            for name, old in self.theta.items()
        }
        return DenseWeights(theta, self.sets)

    def restricted(self, slots: dict[str, Tensors]) -> dict[str, Tensors]:
        """Set optimiser slots to zero outside B; those of another shape than θ stay as they are."""

        def within(name: str, slot: Tensor) -> Tensor:
            if name not in self.sets or slot.shape != self.theta[name].shape:
                return slot
            return torch.where(self.sets[name].backward, slot, slot.new_zeros(()))

        return {k: {n: within(n, slot) for n, slot in tree.items()} for k, tree in slots.items()}

    def chosen(
        self,
        dense: Params,
        masks: Mapping[str, Masks],
        slots: dict[str, Tensors],
        sizes: Mapping[str, tuple[int, int]],
    ) -> tuple["DenseWeights", dict[str, Tensors]]:
        """Take over new sets; a slot follows its weight where that stays in B, else is zero.

        Slots of another shape than the values, such as one number per row, stay as they are.

        Args:
            dense: What `dense` returns, of which the sets were chosen.
            masks: The new sets.
            slots: Slots of the optimiser.
            sizes: |A| and |B| of the new sets.

        Returns:
            The weights and the slots.
        """
        weights = DenseWeights(dict(dense), dict(masks))
        return weights, weights.restricted(slots)
