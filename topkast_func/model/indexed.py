"""Sets that are indexed for the kernels, beside masks."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from topkast_func.block_masks import is_of_blocks
from topkast_func.checks import check_block_shape, check_callable
from topkast_func.kernels.pattern import Pattern, is_indexed, pattern_of, places_in
from topkast_func.leaves import check_present
from topkast_func.model.alone import alone_with, as_plain
from topkast_func.model.layers import kernel_weights
from topkast_func.model.modules import tensors_of
from topkast_func.places import gathered
from topkast_func.trees import check_known, check_mask_pair, check_named
from topkast_func.types import Masks, Model, changed

HIDDEN = (
    "an index is made of numbers, and torch.func.grad and vmap hide those of masks[{!r}]: call "
    "index_masks outside of them, and pass what it returns in"
)


class Indexed(NamedTuple):
    """A and B of a weight, indexed for the kernels.

    Attributes:
        pattern: The two disjoint sets, over blocks.
        shape: Of the weight.
        places: Where the values of B stand in the flat θ, A first: [|B|] or [blocks, r, c].
    """

    pattern: Pattern
    shape: tuple[int, ...]
    places: Tensor

    def split(self, theta: Tensor) -> Tensor:
        """Gather the values of B from θ, A first: [|B|] or [blocks, r, c]."""
        return gathered(theta, self.places)

    def active(self) -> "Indexed":
        """Return the sets for a pass without a gradient, which reads the values of A alone."""
        return changed(self, places=self.places[: self.pattern.active_count])


AnySets: TypeAlias = Masks | Indexed
"""A and B of a weight."""


def index_masks(
    model: Model, masks: Mapping[str, Masks], block_shape: tuple[int, int] = (1, 1)
) -> dict[str, AnySets]:
    """Index the sets of layers that kernels compute, to be given in place of masks.

    `sparse_forward` and `penalized_loss` then run these layers on the kernels. The index is
    made of the contents of the masks, which `torch.func` and `torch.compile` do not see, and
    serves until the next refresh: make it once, not at each call.

    Args:
        model: The module.
        masks: Sets by name.
        block_shape: (r, c) of the blocks that the sets are made of.

    Returns:
        Indexed sets where kernels can compute the layer, masks elsewhere.

    Raises:
        TypeError: The sets are not `Masks` of bool by name, ``model`` is not callable, or
            ``block_shape`` is no pair of integers.
        ValueError: The sets are of what is no parameter or without values, or those of a layer are
            not made of such blocks or have another shape than its weight, or a transform of
            `torch.func` hides their numbers.

    Example:
        >>> import topkast_func as tk
        >>> model = torch.nn.Linear(8, 4, bias=False)
        >>> params = {"weight": torch.arange(32.0).reshape(4, 8)}
        >>> masks = {"weight": Masks(params["weight"] >= 24, params["weight"] >= 16)}
        >>> sets = index_masks(model, masks, block_shape=(2, 4))
        Traceback (most recent call last):
        ValueError: the sets of 'weight' are not made of blocks of (2, 4)
        >>> sets = index_masks(model, masks, block_shape=(1, 4))
        >>> tk.sparse_forward(model, params, sets, torch.ones(1, 8))
        tensor([[  0.,   0.,   0., 220.]])
    """
    block_shape = check_block_shape("block_shape", block_shape)
    model = as_plain(model)
    check_callable("model", model)
    check_named("masks", masks, "Masks")
    check_known("masks", masks, tensors_of(model) or masks)
    shapes = {
        name: shape
        for name, shape in alone_with(model, partial(kernel_weights, model)).items()
        if is_indexed(shape, block_shape)
    }
    for name, sets in masks.items():
        check_mask_pair(f"masks[{name!r}]", sets, shapes.get(name))
        for mask in sets:
            check_present(f"masks[{name!r}]", mask)
            if is_functorch_wrapped_tensor(mask):
                raise ValueError(HIDDEN.format(name))
        if name in shapes and not all(is_of_blocks(mask, block_shape) for mask in sets):
            raise ValueError(f"the sets of {name!r} are not made of blocks of {block_shape}")
    return {
        name: _indexed(sets, block_shape, shapes[name]) if name in shapes else sets
        for name, sets in masks.items()
    }


def _indexed(sets: Masks, block_shape: tuple[int, int], shape: torch.Size) -> Indexed:
    pattern = pattern_of(*sets, block_shape)
    return Indexed(pattern, (*shape,), places_in(pattern, block_shape, shape))
