"""When the sets are chosen anew, and when they stay."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from topkast_func.checks import check_count
from topkast_func.sparsity import begun


class ByStep(Mapping[int, int | None]):
    """N, steps between refreshes, by the step from which on it holds: read-only and hashable."""

    def __init__(self, intervals: Mapping[int, int | None]) -> None:
        """Copy the items of ``intervals``, in ascending order."""
        self._intervals = dict(sorted(intervals.items()))

    def __getitem__(self, step: int) -> int | None:
        """Return the interval that holds from ``step`` on."""
        return self._intervals[step]

    def __iter__(self) -> Iterator[int]:
        """Iterate over the steps at which the interval changes."""
        return iter(self._intervals)

    def __len__(self) -> int:
        """Count them."""
        return len(self._intervals)

    def __hash__(self) -> int:
        """Hash the items, so that a configuration can key a cache."""
        return hash(tuple(self._intervals.items()))

    def __repr__(self) -> str:
        """Print as the dictionary it was made from."""
        return repr(self._intervals)


def check_refresh_every(value: object) -> int | ByStep | None:
    """Return ``refresh_every`` in its hashable form.

    Args:
        value: N, at least 1, or None; or a mapping to these from the steps at which each begins.

    Returns:
        The number, None, or the mapping.

    Raises:
        TypeError: A step or an interval is not an integer.
        ValueError: One is out of range, or nothing is said of step 0.
    """
    if not isinstance(value, Mapping):
        return _interval("refresh_every", value)
    steps = [check_count("a step of refresh_every", step, 0) for step in value]
    if 0 not in steps:
        raise ValueError(f"refresh_every must say what holds from step 0 on, got {dict(value)}")
    return ByStep({step: _interval(f"refresh_every[{step}]", value[step]) for step in steps})


def _interval(name: str, value: object) -> int | None:
    return None if value is None else check_count(name, value, 1)


@dataclass(frozen=True)
class Schedule:
    """When the sets of a configuration change.

    Attributes:
        every: N, steps between refreshes, or by the step from which on it holds.
        until: Step before which B becomes A and the sets stay; None for never.
        starts: Steps after 0 from which on another sparsity is in force, ascending. Sets that
            have it are chosen at the end of the step before: n steps reach what begins at n.
    """

    every: int | ByStep | None
    until: int | None
    starts: tuple[int, ...]

    def settled(self, step: int) -> bool:
        """Return whether B is A from a step on, and the sets stay."""
        return self.until is not None and step >= self.until

    def stage(self, step: int) -> int:
        """Return the step at which the sparsities in force at ``step`` began."""
        return begun((0, *self.starts), step)

    def interval(self, step: int) -> int | None:
        """Return N as it holds at a step."""
        if not isinstance(self.every, ByStep):
            return self.every
        return self.every[begun(self.every, step)]

    def refreshes_at(self, step: int) -> bool:
        """Return whether the sets are chosen anew between a step and the one before.

        Args:
            step: Number t of the step, from 0.

        Returns:
            True where t > 0 and N divides it, where a sparsity changes, and where B becomes A;
            never after that.
        """
        if self.settled(step):
            return step == self.until
        every = self.interval(step)
        return (every is not None and step > 0 and step % every == 0) or step in self.starts
