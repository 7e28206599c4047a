"""Sparsities: one for all, by pattern, or in stages over time."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import NamedTuple, TypeAlias

from topkast_func.checks import check_count, check_number, check_type


def density(sparsity: float) -> float:
    """Return the density D = 1 − sparsity, both fractions."""
    return 1.0 - sparsity


STAGES = 10_000
"""Most stages of a schedule; `train_step` compiles for each."""


class Allocation(NamedTuple):
    """Sparsities of one parameter.

    Attributes:
        forward: 1 − D, fraction in [0, 1).
        backward: 1 − (D + M), fraction in [0, forward].
    """

    forward: float
    backward: float

    @property
    def forward_density(self) -> float:
        """D."""
        return density(self.forward)

    @property
    def backward_density(self) -> float:
        """D + M."""
        return density(self.backward)


class ByPattern(Mapping[str, float]):
    """A number by glob pattern: a read-only, hashable mapping.

    Its patterns are compiled once, since `fnmatch` cannot be traced by torch.compile.
    """

    def __init__(self, numbers: Mapping[str, float]) -> None:
        """Copy the items of ``numbers``, in their order."""
        self._numbers = dict(numbers)
        self._regexes = {glob: re.compile(translate(glob)) for glob in numbers}

    def __getitem__(self, pattern: str) -> float:
        """Return the number of a pattern."""
        return self._numbers[pattern]

    def matching(self, pattern: str, names: Iterable[str]) -> list[str]:
        """Return the names that a pattern of the mapping matches, or is."""
        return [n for n in names if n == pattern or self._regexes[pattern].match(n)]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the patterns."""
        return iter(self._numbers)

    def __len__(self) -> int:
        """Count the patterns."""
        return len(self._numbers)

    def __hash__(self) -> int:
        """Hash the items, so that a configuration can key a cache."""
        return hash(frozenset(self._numbers.items()))

    def __repr__(self) -> str:
        """Print as the dictionary it was made from."""
        return repr(self._numbers)


@dataclass(frozen=True)
class Staged:
    """A sparsity that changes at given steps and stays in between; see `staged`.

    Attributes:
        steps: Where the stages begin, ascending, the first at 0; they may be given in any order.
        sparsities: The sparsity of each stage, fractions in [0, 1).

    Raises:
        TypeError: A step is no integer, a sparsity no number, or they are no sequences.
        ValueError: A sparsity is out of range, no stage starts at step 0, two start at the same
            step, or there are not as many steps as sparsities.
    """

    steps: tuple[int, ...]
    sparsities: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the stages and store them in their order, their numbers as Python's."""
        check_type("steps", self.steps, Sequence)
        check_type("sparsities", self.sparsities, Sequence)
        if len(self.steps) != len(self.sparsities):
            raise ValueError(
                f"each stage must have a step and a sparsity, got steps {self.steps} and "
                f"sparsities {self.sparsities}"
            )
        starts = [check_count("a step of staged", step, 0) for step in self.steps]
        stages = {
            start: check_number(f"staged[{start}]", sparsity, 0.0, 1.0)
            for start, sparsity in zip(starts, self.sparsities, strict=True)
        }
        if 0 not in stages:
            raise ValueError(f"one stage must start at step 0, got stages at {starts}")
        if len(stages) < len(starts):
            raise ValueError(f"stages must start at different steps, got stages at {starts}")
        object.__setattr__(self, "steps", tuple(sorted(stages)))
        object.__setattr__(self, "sparsities", tuple(stages[start] for start in self.steps))

    def at(self, step: int) -> float:
        """Return the sparsity in force at a step, an integer of at least 0."""
        start = begun(self.steps, check_count("step", step, 0))
        return self.sparsities[self.steps.index(start)]


Fixed: TypeAlias = float | ByPattern
"""A sparsity at one moment."""

Sparsity: TypeAlias = float | Mapping[str, float] | Staged


def numbers(sparsity: Sparsity | None) -> tuple[float, ...]:
    """Return every number that a sparsity consists of; none where it is not given."""
    if sparsity is None:
        return ()
    if isinstance(sparsity, Staged):
        return sparsity.sparsities
    return tuple(sparsity.values()) if isinstance(sparsity, Mapping) else (sparsity,)


def begun(starts: Iterable[int], step: int) -> int:
    """Return the last of the starts of stages, the first at 0, that is not after a step."""
    return max(start for start in starts if start <= step)


def staged(stages: Mapping[int, float]) -> Staged:
    """Let a sparsity change over time, in stages.

    Each stage has tensors of its own sizes: `train_step` compiles once for each, so have few.

    Args:
        stages: Sparsity, a fraction in [0, 1), by the step it starts at; one starts at 0.

    Returns:
        What `TopKastConfig` takes as a sparsity.

    Raises:
        TypeError: ``stages`` is no mapping, a step no integer or a sparsity no number.
        ValueError: A sparsity is out of range, or no stage starts at step 0.

    Example:
        >>> staged({0: 0.5, 1000: 0.8, 3000: 0.9}).at(1500)
        0.8
    """
    check_type("stages", stages, Mapping)
    return Staged(tuple(stages), tuple(stages.values()))


def cubic(initial: float, final: float, begin: int, end: int, stages: int = 8) -> Staged:
    """Raise a sparsity along the cubic of gradual magnitude pruning, in equal stages of time.

    s_t = s_f + (s_i − s_f)·(1 − (t − t_0)/(t_1 − t_0))³ (Zhu and Gupta, 2017, "To prune, or not
    to prune", equation 1), t taken at the last of the starts of stages.

    Args:
        initial: s_i, sparsity before ``begin``, fraction in [0, 1).
        final: s_f, sparsity from ``end`` on.
        begin: t_0, step, at least 0.
        end: t_1, step after ``begin``.
        stages: How many times the sparsity changes, from 1 to 10,000.

    Returns:
        What `TopKastConfig` takes as a sparsity.

    Raises:
        TypeError: A step is no integer or a sparsity no number.
        ValueError: A sparsity is out of range, or ``end`` is not after ``begin``.

    Example:
        >>> cubic(0.0, 0.9, 0, 4000, stages=2)
        Staged(steps=(0, 2000, 4000), sparsities=(0.0, 0.7875, 0.9))
    """
    initial = check_number("initial", initial, 0.0, 1.0)
    final = check_number("final", final, 0.0, 1.0)
    starts = cubic_fractions(*check_cubic(begin, end, stages))
    return staged({step: initial + (final - initial) * share for step, share in starts.items()})


def check_cubic(begin: object, end: object, stages: object) -> tuple[int, int, int]:
    """Return when a cubic rises, and in how many stages, as Python integers.

    Args:
        begin: Step at which it begins, at least 0.
        end: Step at which it ends, after ``begin``.
        stages: How many times it changes, from 1 to 10,000.

    Returns:
        The three.

    Raises:
        TypeError: An argument is no integer.
        ValueError: ``end`` is not after ``begin``, or an argument is out of range.
    """
    begin = check_count("begin", begin, 0)
    return begin, check_count("end", end, begin + 1), check_count("stages", stages, 1, STAGES)


def cubic_fractions(begin: int, end: int, stages: int) -> dict[int, float]:
    """Return, by the step it starts at, how much of the way each stage of `cubic` has gone.

    Args:
        begin: Step before which it is 0.
        end: Step from which on it is 1.
        stages: How many times it changes; see `check_cubic`.

    Returns:
        Fractions in [0, 1] by step; the first is at step 0.
    """
    changes = range(1, stages + 1)
    starts = {begin - (begin - end) * i // stages: i / stages for i in changes}
    return {0: 0.0} | {step: 1.0 - (1.0 - way) ** 3 for step, way in starts.items()}
