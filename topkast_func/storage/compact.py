"""Compact storage: values, gradients and optimiser slots of B only; θ rests beside them."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from topkast_func.kernels.pattern import Pattern, block_of, is_indexed
from topkast_func.model.alpha import alpha, alpha_when_read, merge
from topkast_func.penalty import Terms, summed_penalty
from topkast_func.places import counted
from topkast_func.storage.index import (
    Index,
    Positions,
    carry,
    flat_pieces,
    index_of,
    masks_at,
    old_slots,
    reindex,
    split_by,
    split_in_pieces,
    tensors_of,
)
from topkast_func.types import Masks, Params, Tensors, changed


class CompactWeights(NamedTuple):
    """`Weights`, stored as the values of B.

    After B has become A, the places of B∖A are unused: their values, gradients and slots are
    zero and stay so, and no shape has changed.

    Attributes:
        values: θ on B of the sparse parameters, [|B|] or [blocks, r, c], those of A first; all
            of θ of the others.
        patterns: Sets of the sparse parameters that kernels compute.
        positions: Sets of the other sparse parameters.
        theta: θ of the sparse parameters as it was at the last refresh; right outside B, and
            out of date on B. On the meta device where another process owns it: `values` then
            has zeros on B∖A.
    """

    values: Tensors
    patterns: dict[str, Pattern]
    positions: dict[str, Positions]
    theta: Tensors

    @property
    def sparse_names(self) -> tuple[str, ...]:
        """Names of the sparse parameters."""
        return tuple(self.theta)

    @property
    def set_tensors(self) -> list[Tensor]:
        """What patterns and positions consist of."""
        found: list[Index] = [*self.patterns.values(), *self.positions.values()]
        return [tensor for sets in found for tensor in tensors_of(sets)]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every parameter."""
        return {n: self.theta.get(n, value).shape for n, value in self.values.items()}

    def sets(self, name: str) -> Index:
        """Return the sets of a sparse parameter."""
        return self.patterns[name] if name in self.patterns else self.positions[name]

    def index_of(self, name: str) -> Index | None:
        """Return the index of a sparse parameter, None for a dense one."""
        return self.sets(name) if name in self.theta else None

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return how many entries A and B have, by name."""
        used = [self._where(name) < theta.numel() for name, theta in self.theta.items()]
        return {
            name: (self.sets(name).active_count * math.prod(self.values[name].shape[1:]), count)
            for name, count in zip(self.theta, counted(used), strict=True)
        }

    def alpha(self, values: Tensors) -> Tensors:
        """Return α, put together where it is read."""
        return self._alpha(values, alpha_when_read)

    def penalty(
        self,
        values: Tensors,
        terms: Terms,
        starts: Mapping[str, int] | None = None,
    ) -> Tensor:
        """Return the exploration penalty of ``values``; see `exploration_penalty`.

        Args:
            values: See `values`; of a parameter in ``starts`` some, in a row.
            terms: What it sums.
            starts: By name which of the values is the first of these.

        Returns:
            The penalty, 0-d.
        """

        def parts(name: str) -> tuple[Tensor, Tensor]:
            value, start = values[name], (starts or {}).get(name, 0)
            place = torch.arange(start, start + value.shape[0], device=value.device)
            active = (place < self.sets(name).active_count).view(-1, *[1] * (value.ndim - 1))
            return torch.where(active, value, 0.0), torch.where(active, 0.0, value)

        return summed_penalty(terms, parts, next(iter(values.values())).device)

    def add(self, updates: Tensors) -> "CompactWeights":
        """Add ``updates``: all that is held is in B."""
        values = {name: value + updates[name] for name, value in self.values.items()}
        return changed(self, values=values)

    def mask_slots(self, slots: dict[str, Tensors]) -> dict[str, Tensors]:
        """Return the slots as they are: they have no entry outside B."""
        return slots

    def dense(self) -> Tensors:
        """Return θ, up to date: the sparse parameters where θ rests, on meta included."""
        return {
            name: merge(value, self.theta[name], self._where(name)) if name in self.theta else value
            for name, value in self.values.items()
        }

    def forward(self) -> Tensors:
        """Return α."""
        return self._alpha(self.values, alpha)

    def masks(self) -> dict[str, Masks]:
        """Return A and B, on the device of the values."""
        return {name: self._masks(name) for name in self.theta}

    def reindexed(
        self,
        dense: Params,
        masks: Mapping[str, Masks],
        slots: dict[str, Tensors],
        sizes: Mapping[str, tuple[int, int]],
    ) -> tuple["CompactWeights", dict[str, Tensors]]:
        """Take over new sets."""
        held, moved = dict(self.values), {}
        theta = {name: dense[name] for name in self.theta}
        index: dict[str, Index] = {}
        for name, merged in theta.items():
            value = self.values[name]
            here = Masks(*(mask.to(value.device) for mask in masks[name]))
            sets = reindex(self.sets(name), here, block_of(value), sizes[name])
            new = sets.flat_index(block_of(value), merged.shape)
            if merged.is_meta:
                held[name], moved[name] = value.new_zeros(new.shape), new.to("meta")
            else:
                held[name] = split_in_pieces(merged, new.to(merged.device)).to(value.device)
                moved[name] = old_slots(self._where(name), new, merged.numel())
            index[name] = sets

        def carried(name: str, slot: Tensor) -> Tensor:
            follows = name in moved and slot.shape == self.values[name].shape
            return carry(slot, moved[name]) if follows else slot

        return _placed(held, index, theta), {
            k: {n: carried(n, slot) for n, slot in tree.items()} for k, tree in slots.items()
        }

    def _alpha(self, values: Tensors, put_together: Callable[..., Tensor]) -> Tensors:
        return {
            name: put_together(value, self.sets(name).parts, self.theta[name].shape)
            if name in self.theta
            else value
            for name, value in values.items()
        }

    def _where(self, name: str) -> Tensor:
        return self.sets(name).flat_index(block_of(self.values[name]), self.theta[name].shape)

    def _masks(self, name: str) -> Masks:
        return masks_at(self.sets(name), block_of(self.values[name]), self.theta[name].shape)


def compact(
    params: Params,
    masks: dict[str, Masks],
    sizes: Mapping[str, tuple[int, int]],
    layers: Collection[str],
    block_shape: tuple[int, int],
    theta_device: torch.device | str | None = None,
    stored: Mapping[str, int] | None = None,
) -> CompactWeights:
    """Store weights compactly.

    Args:
        params: θ by name; the weights have it for their own.
        masks: Sets of the sparse parameters, each of which is taken out when it is stored: both
            together, and the values, would take more memory than there need be.
        sizes: |A| and |B| by name.
        layers: Names of the sparse weights that kernels are to compute, if they can.
        block_shape: (r, c) of the blocks that the sets are made of.
        theta_device: Where θ rests; None for where it is.
        stored: How many values, or blocks of them, there are to be at the least, by name.

    Returns:
        The weights.
    """
    kept = stored or {}
    layers = {n for n in masks if n in layers and is_indexed(params[n].shape, block_shape)}
    theta = {name: params[name].to(theta_device) for name in masks}
    held = dict(params)
    index: dict[str, Index] = {}
    for name, dense in theta.items():
        block = block_shape if name in layers else (1, 1)
        exploring = kept.get(name, 0) - sizes[name][0] // math.prod(block)
        sets = index_of(masks.pop(name), block, sizes[name], name in layers, exploring)
        index[name] = sets
        count = sets.active_count + sets.exploring_count
        shape = (count,) if block == (1, 1) else (count, *block)
        pieces = flat_pieces(sets, block, dense.shape)
        held[name] = split_by(dense, pieces, shape).to(params[name].device)
    return _placed(held, index, theta)


def _placed(held: Tensors, index: Mapping[str, Index], theta: Tensors) -> CompactWeights:
    """Return the weights of values, of which it is told where they stand in θ."""
    patterns = {name: sets for name, sets in index.items() if isinstance(sets, Pattern)}
    positions = {name: sets for name, sets in index.items() if isinstance(sets, Positions)}
    return CompactWeights(held, patterns, positions, theta)
