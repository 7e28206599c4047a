"""N of M: groups of consecutive entries, in each of which a count is exact."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from topkast_func.places import bands
from topkast_func.sparsity import Sparsity, density, numbers

ROUNDING = 1e-6
"""How far from a whole number the entries of a group may be that a sparsity asks for."""


class NOfM(NamedTuple):
    """N entries of each group of M.

    Attributes:
        kept: N, from 1 to M.
        group: M, at least 2.
    """

    kept: int
    group: int

    @property
    def sparsity(self) -> float:
        """1 − N/M."""
        return 1.0 - self.kept / self.group

    def share(self, sparsity: float) -> int | None:
        """Return how many of a group stay at a sparsity; None where that is no whole number."""
        share = density(sparsity) * self.group
        return round(share) if abs(share - round(share)) < ROUNDING else None

    def __str__(self) -> str:
        """Print as ``"N:M"``."""
        return f"{self.kept}:{self.group}"


def check_pattern(name: str, value: object) -> NOfM:
    """Return the numbers of a pattern such as ``"2:4"``.

    Args:
        name: What the pattern is called in the error.
        value: The pattern to check.

    Returns:
        N and M.

    Raises:
        TypeError: ``value`` is no string.
        ValueError: It is not of the form ``"N:M"``, M is below 2, or N is not in [1, M].
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string such as '2:4', got {value!r}")
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", value)
    pattern = NOfM(*map(int, found.groups())) if found else NOfM(0, 0)
    if pattern.group < 2 or not 1 <= pattern.kept <= pattern.group:
        raise ValueError(f"{name} must be 'N:M', 1 ≤ N ≤ M and M ≥ 2, such as '2:4', got {value!r}")
    return pattern


def check_shares(pattern: NOfM, forward: Sparsity | None, backward: Sparsity | None) -> None:
    """Check that sparsities keep N, and whole numbers, of each group.

    Args:
        pattern: N and M.
        forward: Every number of it must be 1 − N/M.
        backward: Every number of it must be 1 − K/M; None where it is not read.

    Raises:
        ValueError: They do not.
    """
    for number in numbers(forward):
        if pattern.share(number) != pattern.kept:
            raise ValueError(
                f"forward_sparsity must be {pattern.sparsity}, as pattern='{pattern}' asks for, or "
                f"be left out (None), got {number}"
            )
    for number in numbers(backward):
        if pattern.share(number) is None:
            raise ValueError(
                f"backward_sparsity must be 1 − K/{pattern.group} for a whole K, the entries of B "
                f"in each group, as pattern='{pattern}' asks for, got {number}"
            )


def grouped(tensor: Tensor, group: int | None) -> Tensor:
    """Return the groups of a tensor as rows.

    Args:
        tensor: [rows, columns, *positions], M dividing the columns; any shape where all of it is
            one group.
        group: M, consecutive entries of the second axis; None for all of the tensor.

    Returns:
        [groups, M]; inverse of `ungrouped`.
    """
    return tensor.reshape(1, -1) if group is None else tensor.movedim(1, -1).reshape(-1, group)


def ungrouped(groups: Tensor, shape: Sequence[int], group: int | None) -> Tensor:
    """Return the tensor of a shape that has these groups; inverse of `grouped`."""
    if group is None:
        return groups.view(shape)
    rows, columns, *positions = shape
    return groups.view(rows, *positions, columns).movedim(-1, 1).contiguous()


def uneven(mask: Tensor, group: int) -> Tensor:
    """Return which groups of a mask have another number of entries than the first: [groups]."""
    first = grouped(mask[:1], group)[0].sum()
    found = mask.new_empty(len(mask), mask[0].numel() // group)
    for band in bands(mask):
        found[band] = (grouped(mask[band], group).sum(1) != first).view_as(found[band])
    return found.flatten()
