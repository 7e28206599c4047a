"""What a state asks of its weights, in whatever storage they are."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from topkast_func.kernels.pattern import Pattern
from topkast_func.penalty import Terms
from topkast_func.storage.index import Index
from topkast_func.types import Masks, Params, Tensors

Self = TypeVar("Self")


class Weights(Protocol):
    """The weights of a state: a tuple of trees of tensors, never written to."""

    @property
    def values(self) -> Tensors:
        """What is differentiated and updated; optimiser slots have its shapes."""

    @property
    def theta(self) -> Tensors:
        """θ as it rests, of the sparse parameters at the least."""

    @property
    def patterns(self) -> dict[str, Pattern]:
        """Sets of the sparse parameters that kernels compute."""

    @property
    def sparse_names(self) -> tuple[str, ...]:
        """Names of the sparse parameters."""

    @property
    def set_tensors(self) -> list[Tensor]:
        """What says which entries are in A and in B."""

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every parameter."""

    def index_of(self, name: str) -> Index | None:
        """Return where the values of a parameter stand; None where each has its own place in θ."""

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return how many entries A and B have, by name."""

    def alpha(self, values: Tensors) -> Tensors:
        """Return what the model computes with.

        Args:
            values: See `values`.

        Returns:
            α by name, with the gradient of the identity on B.
        """

    def forward(self) -> Tensors:
        """Return α of the values as they are."""

    def dense(self) -> Tensors:
        """Return θ, up to date."""

    def masks(self) -> dict[str, Masks]:
        """Return A and B."""

    def penalty(self, values: Tensors, terms: Terms) -> Tensor:
        """Return the exploration penalty of ``values``, 0-d; see `exploration_penalty`."""

    def add(self: Self, updates: Tensors) -> Self:
        """Add ``updates`` on B, leaving every other entry as it is, bit for bit."""

    def mask_slots(self, slots: dict[str, Tensors]) -> dict[str, Tensors]:
        """Set optimiser slots to zero outside B; those of another shape than θ stay as they are."""

    def reindexed(
        self: Self,
        dense: Params,
        masks: Mapping[str, Masks],
        slots: dict[str, Tensors],
        sizes: Mapping[str, tuple[int, int]],
    ) -> tuple[Self, dict[str, Tensors]]:
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
