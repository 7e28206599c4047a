"""Dense storage: θ and boolean masks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from topkast_func.config import TopKastConfig
from topkast_func.forward import straight_through_all
from topkast_func.loss import exploration_penalty
from topkast_func.masks import Masks
from topkast_func.types import Tensors


class DenseWeights(NamedTuple):
    """The weights of a state, stored densely.

    Attributes:
        theta: θ by name.
        masks: Sets of the sparse parameters by name.
    """

    theta: Tensors
    masks: dict[str, Masks]

    def values(self) -> Tensors:
        """Return what is differentiated and updated; optimiser slots have its shapes."""
        return self.theta

    def alpha(self, values: Tensors) -> Tensors:
        """Return α of ``values``, with the gradient of the identity on B."""
        return straight_through_all(values, self.masks)

    def penalty(self, values: Tensors, config: TopKastConfig) -> Tensor:
        """Return the exploration penalty of ``values``."""
        return exploration_penalty(values, self.masks, config)

    def moved(self, updates: Tensors) -> "DenseWeights":
        """Add ``updates`` on B, leaving every other entry as it is, bit for bit."""
        theta = {
            name: torch.where(self.masks[name].backward, old + updates[name], old)
            if name in self.masks
            else old + updates[name]
            for name, old in self.theta.items()
        }
        return DenseWeights(theta, self.masks)

    def restricted(self, slots: dict[str, Tensors]) -> dict[str, Tensors]:
        """Set optimiser slots to zero outside B."""
        return {
            kind: {
                name: torch.where(self.masks[name].backward, slot, 0.0)
                if name in self.masks
                else slot
                for name, slot in tree.items()
            }
            for kind, tree in slots.items()
        }

    def chosen(
        self, masks: Mapping[str, Masks], slots: dict[str, Tensors]
    ) -> tuple["DenseWeights", dict[str, Tensors]]:
        """Take over new sets; a slot stays where its weight stays in B, else it is zero."""
        weights = DenseWeights(self.theta, dict(masks))
        return weights, weights.restricted(slots)
