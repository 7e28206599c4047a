"""The numbers that a loss function returns beside the loss, of which ranks send the average.

They travel with the gradients, so that all ranks are to know beforehand which numbers they are.
What the trial of a mode has found is compared over the ranks. A rank whose loss function returns
others later on says so at the end of the step, in a roll call that all answer if all return these.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from topkast_func.distributed.bucket import mean_over
from topkast_func.distributed.models import is_mean
from topkast_func.distributed.ranks import Ranks
from topkast_func.distributed.roll import call_roll

Outline: TypeAlias = tuple[tuple[str, torch.dtype], ...]
"""Where numbers stand in a tree, and their dtypes, in their order."""


class Numbers:
    """The numbers that all ranks return, by the mode of the model.

    Args:
        ranks: The processes.

    Attributes:
        dtypes: Those of the numbers that a step sends.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.dtypes: tuple[torch.dtype, ...] = ()
        self._ranks = ranks
        self._known: dict[Hashable, Outline] = {}
        self._mode: Hashable = None
        self._last: Hashable = None

    def expect(self, mode: Hashable, step: int, beside: tuple[Any, ...] | None) -> None:
        """Begin a step of a mode; compare what the trial of a new one has found.

        Args:
            mode: The mode.
            step: Number of the step, for the error.
            beside: What came with the loss in the trial, if anything; None where it has failed.

        Raises:
            RuntimeError: A rank has found others; the same on every rank.
        """
        if mode not in self._known:
            found = outline(beside or ())
            if beside is not None:  # else it has failed, as the step will tell
                call_roll(self._ranks, f"in step {step}, where loss_fn returns {_told(found)}")
            self._known[mode] = found
        if mode != self._mode:
            self._mode, self._last = mode, None
        self.dtypes = _dtypes(self._known[mode])

    def sent(self, leaves: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Return what is sent of the leaves of a tree: NaN where they are not what others send."""
        numbers = [leaves[place] for place in _places(leaves)]
        if tuple(number.dtype for number in numbers) == self.dtypes:
            return numbers
        return [torch.full((), math.nan, dtype=dtype, device=device) for dtype in self.dtypes]

    def put(self, leaves: Sequence[Tensor], means: Sequence[Tensor]) -> list[Tensor]:
        """Return the leaves of a tree, with what came of that which `sent` returns."""
        places = _places(leaves)
        alike = tuple(leaves[place].dtype for place in places) == self.dtypes
        found = dict(zip(places, means, strict=True)) if alike else {}
        return [found.get(place, leaf) for place, leaf in enumerate(leaves)]

    def agreed(self, aux: tuple[Any, ...], step: int, share: Tensor) -> tuple[Any, ...]:
        """Compare what a step returns with what all expect, and average what was not sent.

        Args:
            aux: What the loss function returned beside the loss, if anything, from `put`.
            step: Number of the step, for the error.
            share: Share of this rank, 0-d.

        Returns:
            That, averaged.

        Raises:
            RuntimeError: Other ranks do not return these; the same on every rank.
        """
        leaves, structure = tree_flatten(aux)
        kinds = structure, [(leaf.ndim, leaf.dtype) for leaf in leaves]
        if kinds == self._last:
            return aux
        now, before = outline(aux), self._known[self._mode]
        if now != before:
            told = f"where loss_fn returns {_told(now)}, and before {_told(before)}"
            call_roll(self._ranks, f"at the end of step {step}, {told}")
            if _dtypes(now) != self.dtypes:
                self.dtypes = _dtypes(now)
                sent = mean_over(self._ranks.group, share, self.sent(leaves, share.device))
                aux = tree_unflatten(self.put(leaves, sent), structure)
        self._known[self._mode], self._last = now, kinds
        return aux


def outline(aux: tuple[Any, ...]) -> Outline:
    """Return where the numbers are that ranks average, in what came with a loss, if anything."""
    paths = tree_flatten_with_path(aux)[0]
    return tuple((keystr(path[1:]), leaf.dtype) for path, leaf in paths if _is_number(leaf))


def _is_number(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim == 0 and is_mean(leaf)


def _places(leaves: Sequence[Tensor]) -> list[int]:
    return [place for place, leaf in enumerate(leaves) if _is_number(leaf)]


def _dtypes(numbers: Outline) -> tuple[torch.dtype, ...]:
    return tuple(dtype for _, dtype in numbers)


def _told(numbers: Outline) -> str:
    told = ", ".join(f"{path or 'one'} of {str(d).removeprefix('torch.')}" for path, d in numbers)
    return f"the 0-d tensors {told}" if told else "no floating 0-d tensor"
