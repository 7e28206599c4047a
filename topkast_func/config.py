"""What Top-KAST is asked to do: one frozen, validated record."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

Penalty: TypeAlias = Literal["l2", "l1", "group_l2"]
BlockNorm: TypeAlias = Literal["l2", "l1"]
Predicate: TypeAlias = Callable[[str, Tensor], bool]


class SparsityMap(Mapping[str, float]):
    """Sparsity by glob pattern: a read-only, hashable mapping.

    Its patterns are compiled once, since `fnmatch` cannot be traced by torch.compile.
    """

    def __init__(self, sparsities: Mapping[str, float]) -> None:
        """Copy the items of ``sparsities``, in their order."""
        self._sparsities = dict(sparsities)
        self._regexes = {glob: re.compile(translate(glob)) for glob in sparsities}

    def __getitem__(self, pattern: str) -> float:
        """Return the sparsity of a pattern."""
        return self._sparsities[pattern]

    def matching(self, pattern: str, names: Iterable[str]) -> list[str]:
        """Return the names that a pattern of the mapping matches."""
        return [name for name in names if self._regexes[pattern].match(name)]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the patterns."""
        return iter(self._sparsities)

    def __len__(self) -> int:
        """Count the patterns."""
        return len(self._sparsities)

    def __hash__(self) -> int:
        """Hash the items, so that a configuration can key a cache."""
        return hash(frozenset(self._sparsities.items()))

    def __repr__(self) -> str:
        """Print as the dictionary it was made from."""
        return repr(self._sparsities)


Sparsity: TypeAlias = float | Mapping[str, float]


def density(sparsity: float) -> float:
    """Return the density D = 1 − sparsity, both fractions."""
    return 1.0 - sparsity


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return ``value`` as a float if it is a real number in [low, high).

    Args:
        name: What the number is called in the error.
        value: The number to check.
        low: Lowest value allowed.
        high: First value that is too large.

    Returns:
        The number as a float.

    Raises:
        TypeError: ``value`` is not a real number (booleans and strings are not).
        ValueError: ``value`` is NaN or outside [low, high).
    """
    number = check_real(name, value, f"[{low}, {high})")
    if not low <= number < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value!r}")
    return number


def check_real(name: str, value: object, allowed: str) -> float:
    """Return ``value`` as a float if it is a real number.

    Args:
        name: What the number is called in the error.
        value: The number to check.
        allowed: Its range, for the error.

    Returns:
        The number as a float.

    Raises:
        TypeError: ``value`` is not a real number (booleans and strings are not).
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {allowed}, got {value!r}")
    return float(value)


def check_count(name: str, value: object, low: int) -> int:
    """Return ``value`` as an int if it is a whole number of at least ``low``.

    Args:
        name: What the number is called in the error.
        value: The number to check.
        low: Lowest value allowed.

    Returns:
        The number as an int.

    Raises:
        TypeError: ``value`` is not an integer (booleans are not).
        ValueError: ``value`` is below ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class TopKastConfig:
    """Which weights are sparse, how sparse, and when the sets are chosen anew.

    Sparsities are fractions of each sparse tensor. Where one is a mapping, its keys are
    glob patterns over parameter names; a selected parameter that no pattern of
    ``forward_sparsity`` matches stays dense, and two patterns that give one parameter
    different sparsities are an error.

    Args:
        forward_sparsity: 1 − D, the fraction that is zero in the forward pass, in [0, 1).
        backward_sparsity: 1 − (D + M), the fraction that gets no update, in
            [0, forward_sparsity].
        sparse: Which parameters are sparse: None for every floating parameter of at least
            two dimensions whose name ends in ``weight``; a glob pattern or several; or a
            predicate ``(name, tensor) -> bool``.
        refresh_every: N, steps between two choices of the sets, at least 1; None never
            chooses anew by itself.
        explore_until: Step before which B becomes A and the sets stay, at least 0; None
            explores for ever.
        penalty: Form of the exploration penalty, see `exploration_penalty`; None for none.
        penalty_weight: λ, its weight in the loss, at least 0.
        block_shape: (rows, columns) of the blocks that are chosen whole, over the first two
            axes of a weight, at each position of any further axes.
        block_norm: Norm by which blocks are ranked: "l2" (Euclidean) or "l1" (absolute
            values).

    Raises:
        TypeError: A field has the wrong type; booleans and strings are not numbers.
        ValueError: A field is outside its range, or NaN.

    Example:
        >>> TopKastConfig(forward_sparsity=0.95, backward_sparsity=0.9).refresh_every
        100
    """

    forward_sparsity: Sparsity = 0.9
    backward_sparsity: Sparsity = 0.8
    sparse: str | Sequence[str] | Predicate | None = None
    refresh_every: int | None = 100
    explore_until: int | None = None
    penalty: Penalty | None = "l2"
    penalty_weight: float = 1e-4
    block_shape: tuple[int, int] = (1, 1)
    block_norm: BlockNorm = "l2"

    def __post_init__(self) -> None:
        """Check every field and store it in its hashable form."""
        checked: dict[str, Any] = {
            "forward_sparsity": _sparsity("forward_sparsity", self.forward_sparsity),
            "backward_sparsity": _sparsity("backward_sparsity", self.backward_sparsity),
            "sparse": _selection(self.sparse),
            "refresh_every": _optional_count("refresh_every", self.refresh_every, 1),
            "explore_until": _optional_count("explore_until", self.explore_until, 0),
            "penalty": _choice("penalty", self.penalty, (*get_args(Penalty), None)),
            "penalty_weight": check_number("penalty_weight", self.penalty_weight, 0.0),
            "block_shape": _block_shape(self.block_shape),
            "block_norm": _choice("block_norm", self.block_norm, get_args(BlockNorm)),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if isinstance(self.forward_sparsity, float) and isinstance(self.backward_sparsity, float):
            check_order(self.forward_sparsity, self.backward_sparsity)


def check_order(
    forward_sparsity: float,
    backward_sparsity: float,
    name: str = "backward_sparsity",
    limit: str = "forward_sparsity",
) -> None:
    """Check that the backward set holds the forward set.

    Args:
        forward_sparsity: 1 − D, fraction.
        backward_sparsity: 1 − (D + M), fraction.
        name: What the backward sparsity is called in the error.
        limit: What the forward sparsity is called there.

    Raises:
        ValueError: The backward sparsity exceeds the forward sparsity.
    """
    if backward_sparsity > forward_sparsity:
        raise ValueError(
            f"{name} must be in [0, {limit}={forward_sparsity}], got {backward_sparsity}"
        )


def _sparsity(name: str, value: object) -> float | SparsityMap:
    if not isinstance(value, Mapping):
        return check_number(name, value, 0.0, 1.0)
    if not value:
        raise ValueError(f"{name} must name at least one pattern, got an empty mapping")
    if not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"the keys of {name} must be glob patterns, got {list(value)!r}")
    return SparsityMap({
        pattern: check_number(f"{name}[{pattern!r}]", s, 0.0, 1.0) for pattern, s in value.items()
    })


def _selection(sparse: object) -> tuple[str, ...] | Predicate | None:
    if sparse is None or callable(sparse):
        return sparse
    globs = (sparse,) if isinstance(sparse, str) else sparse
    if not isinstance(globs, Sequence) or not all(isinstance(g, str) for g in globs):
        raise TypeError(
            "sparse must be None, a glob pattern, a sequence of them, or a predicate "
            f"(name, tensor) -> bool, got {sparse!r}"
        )
    if not globs:
        raise ValueError("sparse must name at least one pattern, got an empty sequence")
    return tuple(globs)


def _optional_count(name: str, value: object, low: int) -> int | None:
    return None if value is None else check_count(name, value, low)


def _choice(name: str, value: object, choices: tuple[object, ...]) -> object:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def _block_shape(value: object) -> tuple[int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"block_shape must be a pair (rows, columns), got {value!r}")
    rows, columns = (check_count("block_shape", side, 1) for side in value)
    return rows, columns
