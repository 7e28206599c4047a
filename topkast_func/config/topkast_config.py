"""What training is asked to do: one frozen, validated record."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topkast_func.checks import check_order, check_type
from topkast_func.config.as_json import code_of, described, made, told
from topkast_func.config.fields import Penalty, Predicate, Shares, checked
from topkast_func.config.schedule import Schedule
from topkast_func.groups import NOfM, check_pattern, check_shares
from topkast_func.methods import Method, topkast
from topkast_func.sparsity import ByPattern, Fixed, Sparsity, Staged, density
from topkast_func.types import BlockNorm


@dataclass(frozen=True)
class TopKastConfig:
    """Which weights are sparse, how sparse, and how and when the sets are chosen anew.

    Sparsities are fractions of each sparse tensor. Where one is a mapping, its keys are
    glob patterns over parameter names; a selected parameter that no pattern of
    ``forward_sparsity`` matches stays dense, and two patterns that give one parameter
    different sparsities are an error. Where one is `staged` or `cubic`, it changes over time.

    Args:
        forward_sparsity: 1 − D, the fraction that is zero in the forward pass, in [0, 1); None
            for that of ``pattern``, 1 − N/M, or 0.9 where there is none.
        backward_sparsity: 1 − (D + M), the fraction that gets no update, in
            [0, forward_sparsity]; None lets B be twice as large as A, 1 − min(1, 2·D). Read by the
            methods that explore only.
        sparse: Which parameters are sparse: None for every floating parameter of at least
            two dimensions whose name ends in ``weight`` and which the blocks divide; a glob
            pattern or several; or a predicate ``(name, tensor) -> bool``.
        refresh_every: N, steps between two choices of the sets, at least 1; None never
            chooses anew by itself. A mapping such as ``{0: 1, 2000: 1000}`` says it by the step
            from which on it holds.
        explore_until: Step before which B becomes A and the sets stay, at least 0; None
            explores for ever.
        penalty: Form of the exploration penalty, see `exploration_penalty`; None for none.
            Methods that do not explore have none.
        penalty_weight: λ, its weight in the loss, at least 0. Ten times the default costs
            text 0.1 bits a character under Adam, and gains a convolutional network up to 0.5 %.
        block_shape: (rows, columns) of the blocks that are chosen whole, over the first two
            axes of a weight, at each position of any further axes.
        block_norm: Norm by which blocks are ranked: "l2" (Euclidean) or "l1" (absolute
            values).
        method: How A and B are chosen: `topkast`, `random_backward`, `ste`, `static`, `set`,
            `rigl`, `gmp` or `dense`, each called.
        allocation: How the sparsity is shared among tensors: "uniform", the same for all;
            "erk", by the Erdős–Rényi kernel rule, see `allocate`; or forward densities by
            glob pattern, in (0, 1], the others uniform.
        keep_dense: Glob pattern, or several, of parameters that stay dense after all; see
            `first_weight` and `last_weight`.
        powerprop: Exponent a ≥ 1 of powerpropagation: what is trained is φ, with
            θ = φ·abs(φ)^(a−1) (Schwarz et al., NeurIPS 2021); 1 for θ itself. A zero
            has no gradient then, so a weight of zeros alone is refused.
        pattern: ``"N:M"`` such as "2:4": A has N of each group of M consecutive entries of the
            second axis of a weight (the inputs of linear and convolutional layers), at each
            position of any further axes, and B has K of them, a ``backward_sparsity`` of
            1 − K/M, min(2·N, M) by default. Weights that the groups do not divide stay dense by
            default. Any method; the allocation is uniform, the ``block_shape`` (1, 1).

    Raises:
        TypeError: A field has the wrong type; booleans and strings are not numbers.
        ValueError: A field is outside its range, or NaN, or contradicts ``pattern``.

    Example:
        >>> TopKastConfig(forward_sparsity=0.95, backward_sparsity=0.9).refresh_every
        100
        >>> TopKastConfig(pattern="2:8", backward_sparsity=0.5).forward_sparsity
        0.75
    """

    forward_sparsity: Sparsity | None = None
    backward_sparsity: Sparsity | None = None
    sparse: str | Sequence[str] | Predicate | None = None
    refresh_every: int | Mapping[int, int | None] | None = 100
    explore_until: int | None = None
    penalty: Penalty | None = "l2"
    penalty_weight: float = 1e-5
    block_shape: tuple[int, int] = (1, 1)
    block_norm: BlockNorm = "l2"
    method: Method = field(default_factory=topkast)
    allocation: Shares | Mapping[str, float] = "uniform"
    keep_dense: str | Sequence[str] = ()
    powerprop: float = 1.0
    pattern: str | None = None

    def __post_init__(self) -> None:
        """Check every field and store it in its hashable form."""
        for name, value in checked(vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_over_time()
        if self.pattern is not None:
            self._check_groups(check_pattern("pattern", self.pattern))
        by_pattern = isinstance(self.forward_sparsity, ByPattern)
        if by_pattern and self.allocation != "uniform":
            raise ValueError(
                "an allocation other than 'uniform' shares out one forward_sparsity, not a mapping"
            )
        if self.allocation == "erk" and isinstance(self.backward_sparsity, ByPattern):
            raise ValueError("allocation='erk' shares out one backward_sparsity, not a mapping")
        if isinstance(self.allocation, ByPattern) and isinstance(self.forward_sparsity, Staged):
            raise ValueError(
                "an allocation by pattern fixes densities: forward_sparsity must not be staged"
            )

    def to_json(self) -> str:
        """Describe the configuration in JSON.

        Numbers by pattern are objects, those by step lists of [step, number], and a method is an
        object of the ``name`` of its constructor and its arguments.

        Returns:
            A JSON object, of which `from_json` makes an equal configuration.

        Raises:
            ValueError: ``sparse`` is a predicate or ``method`` one of your own: code has no JSON.

        Example:
            >>> TopKastConfig.from_json(TopKastConfig(0.95, 0.9).to_json()).forward_sparsity
            0.95
        """
        description = described(vars(self))
        if code := code_of(description):
            raise ValueError(f"{told(code)}, which JSON cannot describe")
        return json.dumps(description)

    @classmethod
    def from_json(cls, text: str) -> "TopKastConfig":
        """Make the configuration that a JSON text describes.

        Args:
            text: What `to_json` returned, or written by hand; a field that is left out has its
                default.

        Returns:
            The configuration.

        Raises:
            TypeError: It is no text.
            ValueError: The text is no JSON object, a field or a method is unknown, or a value is
                not allowed.
        """
        check_type("text", text, str)
        try:
            description = json.loads(text)
        except (ValueError, RecursionError) as reason:
            raise ValueError(f"text is no JSON, as to_json returns it: {reason}") from reason
        if code := code_of(description):
            raise ValueError(f"{told(code)}, which JSON cannot describe")
        return made(cls, description, {})

    def _check_over_time(self) -> None:
        starts, until = self.schedule.starts, self.explore_until
        if until is not None and starts and starts[-1] >= until:
            raise ValueError(
                f"a sparsity changes at step {starts[-1]}, but from explore_until={until} on the "
                "sets stay"
            )
        for step in (0, *starts):
            forward, backward = self.sparsities(step)
            if not isinstance(forward, float) or not isinstance(backward, float):
                continue
            if self.method.explores:
                name = f"backward_sparsity at step {step}" if starts else "backward_sparsity"
                check_order(forward, backward, name=name)

    def _check_groups(self, pattern: NOfM) -> None:
        told = f"pattern='{pattern}'"
        if self.block_shape != (1, 1):
            raise ValueError(
                f"{told} chooses single entries, block_shape={self.block_shape} whole blocks: give "
                "one of them"
            )
        if self.allocation != "uniform":
            raise ValueError(
                f"{told} gives every weight one density: allocation must be 'uniform', got "
                f"{self.allocation!r}"
            )
        backward = self.backward_sparsity if self.method.explores else None
        check_shares(pattern, self.forward_sparsity, backward)

    @property
    def group(self) -> int | None:
        """M of ``pattern``; None where counts are exact in whole tensors."""
        return None if self.pattern is None else int(self.pattern.partition(":")[2])

    @property
    def schedule(self) -> Schedule:
        """When the sets change."""
        sparsities = (self.forward_sparsity, self.backward_sparsity)
        staged = {start for s in sparsities if isinstance(s, Staged) for start in s.steps}
        starts = tuple(sorted({*staged, *self.method.starts()} - {0}))
        return Schedule(self.refresh_every, self.explore_until, starts)  # type: ignore[arg-type]

    def sparsities(self, step: int) -> tuple[Fixed, Fixed]:
        """Return forward and backward sparsity of the stage that a step is in."""
        forward, backward = (
            s.at(step) if isinstance(s, Staged) else s
            for s in (self.forward_sparsity, self.backward_sparsity)
        )
        return forward, _derived(forward) if backward is None else backward  # type: ignore[return-value]


def _derived(forward: Any) -> Fixed:
    """Return the backward sparsity at which B is twice as large as A, or everything."""
    if isinstance(forward, ByPattern):
        return ByPattern({pattern: _doubled(sparsity) for pattern, sparsity in forward.items()})
    return _doubled(forward)


def _doubled(sparsity: float) -> float:
    return 1.0 - min(1.0, 2.0 * density(sparsity))
