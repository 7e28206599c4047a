"""An optimiser for each group of parameters: partition."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import NamedTuple

from torch import Tensor

from topkast_func.training.optim.rates import Rate
from topkast_func.training.optim.transformation import (
    Given,
    Optimizer,
    OptimizerState,
    check_optimizer,
    starting,
)
from topkast_func.types import Params, Tensors


class Group(NamedTuple):
    """Parameters that share an optimiser.

    Attributes:
        glob: The pattern of their names.
        regex: The same, compiled, since `fnmatch` cannot be traced by torch.compile.
        optimizer: Their optimiser.
        kinds: The kinds of its slots.
    """

    glob: str
    regex: re.Pattern[str]
    optimizer: Optimizer
    kinds: tuple[str, ...]


def partition(groups: Mapping[str, Optimizer]) -> Optimizer:
    """Give groups of parameters an optimiser each.

    A parameter belongs to the first pattern that matches its name; end with ``"*"`` for the
    others, if any. `clip_by_global_norm` within a group clips by the norm of that group, and before
    `partition` in a chain by that of all.

    Args:
        groups: Optimisers by glob pattern, in order.

    Returns:
        The optimiser. Its learning rates are a mapping by pattern. ``init`` raises ValueError
        where no pattern matches a parameter, or no parameter is left for a pattern.

    Raises:
        TypeError: ``groups`` is no mapping of patterns to optimisers.
        ValueError: There is no group, or not all accumulate gradients over as many calls.

    Example:
        >>> import torch
        >>> from topkast_func.training.optim import adamw, sgd
        >>> optimizer = partition({"*bias": sgd(lr=0.1), "*": adamw(lr=1e-3)})
        >>> optimizer.learning_rate(torch.tensor(0))["*bias"]
        tensor(0.1000, dtype=torch.float64)
    """
    if not isinstance(groups, Mapping) or not all(isinstance(glob, str) for glob in groups):
        raise TypeError(f"partition takes optimisers by glob pattern, got {groups!r}")
    if not groups:
        raise ValueError("partition needs at least one group, got an empty mapping")
    for optimizer in groups.values():
        check_optimizer(optimizer)
    if len(calls := {optimizer.every for optimizer in groups.values()}) > 1:
        raise ValueError(
            f"the groups of partition make an update every {sorted(calls)} calls: accumulate over "
            "all of them, multi_steps(partition(...), every)"
        )
    members = tuple(
        Group(glob, re.compile(translate(glob)), optimizer, tuple(optimizer.init({}).slots))
        for glob, optimizer in groups.items()
    )
    return Optimizer(
        Given(_start_groups, members),
        Given(_update_groups, members),
        Given(_rates, members),
        every=calls.pop(),
        elementwise=all(optimizer.elementwise for optimizer in groups.values()),
        name=f"partition({dict(groups)})",
    )


def _grouped(groups: tuple[Group, ...], names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by pattern."""
    found, left = {}, list(names)
    for group in groups:
        found[group.glob] = [
            name for name in left if (name == group.glob or group.regex.match(name))
        ]
        left = [name for name in left if name not in found[group.glob]]
    if left:
        raise ValueError(f"no pattern of partition matches {left}; there are: {list(found)}")
    return found


def _start_groups(groups: tuple[Group, ...], params: Params) -> OptimizerState:
    named = _grouped(groups, params)
    if params and (idle := [glob for glob, names in named.items() if not names and glob != "*"]):
        raise ValueError(
            f"patterns {idle} of partition match no parameter that none before them matches; "
            f"there are: {', '.join(params)}"
        )
    slots: dict[str, Tensors] = {kind: {} for group in groups for kind in group.kinds}
    for group in groups:
        own = group.optimizer.init({name: params[name] for name in named[group.glob]})
        for kind, tree in own.slots.items():
            slots[kind].update(tree)
    return starting(slots)


def _update_groups(
    groups: tuple[Group, ...],
    grads: Params,
    state: OptimizerState,
    params: Params,
    lr: Rate | None = None,
) -> tuple[Tensors, OptimizerState]:
    named = _grouped(groups, params)
    updates: Tensors = {}
    slots: dict[str, Tensors] = {kind: {} for kind in state.slots}
    for group in groups:
        names = named[group.glob]
        own = {k: {n: state.slots[k][n] for n in names if n in state.slots[k]} for k in group.kinds}
        moved, after = group.optimizer.update(
            {name: grads[name] for name in names},
            OptimizerState(state.step, own),
            {name: params[name] for name in names},
            lr[group.glob] if isinstance(lr, Mapping) else lr,
        )
        updates.update(moved)
        for kind in group.kinds:
            slots[kind].update(after.slots[kind])
    return updates, OptimizerState(state.step + 1, slots)


def _rates(groups: tuple[Group, ...], step: Tensor) -> Rate:
    return {group.glob: group.optimizer.learning_rate(step) for group in groups}
