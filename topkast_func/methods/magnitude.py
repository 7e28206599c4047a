"""Methods whose forward set is the largest in magnitude."""

from dataclasses import dataclass
from typing import ClassVar, get_args

from topkast_func.checks import check_choice, check_share
from topkast_func.filling import drawn_beside, exchanged_sets
from topkast_func.methods.base import Entry, Method, Situation
from topkast_func.ranking import Sets, top_sets
from topkast_func.sparsity import Allocation, begun, check_cubic, cubic_fractions


@dataclass(frozen=True)
class Magnitude(Method):
    """Takes the largest in magnitude; one ranking gives both sets."""

    def sets(self, situation: Situation) -> Sets:
        """Take the largest."""
        return top_sets(
            situation.name,
            situation.scores,
            situation.forward,
            situation.backward,
            situation.group,
        )


@dataclass(frozen=True)
class TopKast(Magnitude):
    """See `topkast`.

    Attributes:
        entry: How an entry that newly enters A starts.
        exchange: Largest fraction of A that a refresh exchanges; None for no bound.
    """

    entry: Entry = "zero"
    exchange: float | None = 0.05
    explores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options and store numbers as Python's."""
        check_choice("entry", self.entry, get_args(Entry))
        if self.exchange is not None:
            object.__setattr__(self, "exchange", check_share("exchange", self.exchange))

    @property
    def enters_at(self) -> Entry:
        """How an entry that newly enters A starts."""
        return self.entry

    @property
    def reads_sets(self) -> bool:
        """Whether a refresh needs to know the old sets."""
        return self.entry != "value" or self.exchange is not None

    def sets(self, situation: Situation) -> Sets:
        """Take the largest, or the largest that the bound on the exchange allows."""
        if situation.active is None or self.exchange is None:
            return super().sets(situation)
        return exchanged_sets(
            situation.name,
            situation.scores,
            situation.active,
            situation.held,
            situation.forward,
            situation.backward,
            self.exchange,
            situation.group,
        )


@dataclass(frozen=True)
class RandomBackward(TopKast):
    """See `random_backward`."""

    def sets(self, situation: Situation) -> Sets:
        """Choose A as Top-KAST does, and add others at random for B."""
        size, wider, draw = situation.forward, situation.backward, situation.generator
        active = super().sets(situation._replace(backward=size))[0]
        return active, drawn_beside(active, size, wider, draw, situation.group)


@dataclass(frozen=True)
class StraightThrough(Magnitude):
    """See `ste`."""

    def sparsities(self, asked: Allocation, step: int) -> Allocation:
        """Let B be everything."""
        return Allocation(asked.forward, 0.0)


@dataclass(frozen=True)
class GradualPruning(Magnitude):
    """See `gmp`.

    Attributes:
        begin: Step at which pruning begins.
        end: Step from which on the sparsity is final.
        stages: How many times the sparsity changes.
    """

    begin: int
    end: int
    stages: int

    def __post_init__(self) -> None:
        """Check the steps and store them as Python's."""
        checked = check_cubic(self.begin, self.end, self.stages)
        for name, number in zip(("begin", "end", "stages"), checked, strict=True):
            object.__setattr__(self, name, number)

    def sparsities(self, asked: Allocation, step: int) -> Allocation:
        """Return the share of the forward sparsity that is reached at the step, twice."""
        shares = self._shares()
        reached = asked.forward * shares[begun(shares, step)]
        return Allocation(reached, reached)

    def starts(self) -> tuple[int, ...]:
        """Return the steps at which a stage begins."""
        return tuple(self._shares())[1:]

    def _shares(self) -> dict[int, float]:
        return cubic_fractions(self.begin, self.end, self.stages)


@dataclass(frozen=True)
class Dense(Method):
    """See `dense`."""

    sparsifies: ClassVar[bool] = False


def topkast(entry: Entry = "zero", exchange: float | None = 0.05) -> Method:
    """Choose A and B by magnitude (Jayakumar et al., "Top-KAST", NeurIPS 2020).

    ``topkast("value", exchange=None)`` is the method of the paper. The defaults are this
    library's own: Adam moves a weight of B∖A by about the learning rate a step whatever its
    gradient, many such weights then enter A at once, each much too large, and the loss jumps.
    On images the paper's form reached more in some measurements, on text less
    (``benchmarks/RESULTS.md``).

    What an entry i that newly enters A starts with:

    - ``"value"``: θ_i as it is.
    - ``"zero"``: 0. The refresh then leaves the network as it is but for what leaves A, as in
      RigL; the magnitude that θ_i had grown to has decided that it enters.
    - ``"threshold"``: sign(θ_i)·min(abs(θ_i), τ), where τ is the smallest magnitude among the
      entries that stay in A; a block is scaled by min(1, τ/norm).

    With ``exchange`` f, at most k = max(1, floor(f·|A| + 1/2)) entries of A are exchanged at a
    refresh: the |A| − k largest of A stay, and the largest of all others join them, with N:M sets
    those of each group that it lacks.

    Under powerpropagation an entry at 0 would never move, so ``"zero"`` is ``"threshold"`` there.

    Args:
        entry: "zero", "threshold" or "value".
        exchange: f, fraction in (0, 1]; None for no bound.

    Returns:
        The method, the default of `TopKastConfig`.

    Raises:
        TypeError: ``exchange`` is no number.
        ValueError: An option is out of range.

    Departures:
        The paper exchanges as much of A as magnitude says, and a weight enters with its value.
    """
    return TopKast(entry, exchange)


def random_backward(entry: Entry = "value", exchange: float | None = None) -> Method:
    """Choose A by magnitude and draw B∖A anew at each refresh (Top-KAST, ablations).

    The random numbers follow from the state's seed and step.

    Args:
        entry: How an entry that newly enters A starts; see `topkast`.
        exchange: Largest fraction of A that a refresh exchanges, in (0, 1]; None for no bound.

    Returns:
        The method.

    Raises:
        TypeError: ``exchange`` is no number.
        ValueError: An option is out of range.
    """
    return RandomBackward(entry, exchange)


def ste() -> Method:
    """Choose A by magnitude and train every weight, without a penalty.

    The gradient at α passes straight through to all of θ (Bengio et al., 2013, arXiv 1308.3432;
    as "STE" in JaxPruner, Lee et al., 2023). ``backward_sparsity`` is not read. Usually with
    ``refresh_every=1``.

    Returns:
        The method.
    """
    return StraightThrough()


def gmp(begin: int, end: int, stages: int = 7) -> Method:
    """Prune by magnitude, gradually, from dense to ``forward_sparsity``.

    Zhu and Gupta, "To prune, or not to prune", 2017: the sparsity rises along a cubic, see
    `cubic`; what is pruned keeps its value and learns no more.

    Args:
        begin: Step at which pruning begins, at least 0.
        end: Step from which on the sparsity is ``forward_sparsity``, after ``begin``.
        stages: How many times the sparsity changes; `train_step` compiles for each.

    Returns:
        The method.

    Raises:
        TypeError: An argument is no integer.
        ValueError: An argument is out of range.
    """
    return GradualPruning(begin, end, stages)


def dense() -> Method:
    """Train every weight densely: no parameter is sparse, whatever the configuration selects.

    Returns:
        The method.
    """
    return Dense()
