"""What optimisers are put together from, named as in optax."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import NamedTuple

import torch
from torch import Tensor

from topkast_func.checks import check_count, check_real
from topkast_func.training.learning_rates import Rate
from topkast_func.training.transformation import (
    Given,
    Optimizer,
    OptimizerState,
    Transformation,
    check_optimizer,
    starting,
    wide,
)
from topkast_func.types import Params, Tensors


class Member(NamedTuple):
    """A part of a chain.

    Attributes:
        part: A transformation, or the optimiser.
        kinds: The kinds of slots that are its own.
    """

    part: Transformation
    kinds: tuple[str, ...]


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


def clip_by_global_norm(max_norm: float) -> Transformation:
    """Scale all gradients together so that their norm is at most ``max_norm``.

    g ← g · min(1, max_norm / ‖g‖₂), the norm being that of all parameters as one vector: dense
    ones, and B of the sparse ones (Pascanu et al., 2013, algorithm 1). It is summed in float32,
    in float64 for gradients of float64.

    Args:
        max_norm: Above 0, finite.

    Returns:
        A part of `chain`.

    Raises:
        TypeError: ``max_norm`` is no number.
        ValueError: It is out of range.

    Example:
        >>> clip = clip_by_global_norm(1.0)
        >>> gradients = {"weight": torch.tensor([3.0, 4.0])}
        >>> clip.update(gradients, clip.init(gradients), gradients)[0]
        {'weight': tensor([0.6000, 0.8000])}
    """
    most = check_real("max_norm", max_norm, "(0, inf)")
    if not 0.0 < most < float("inf"):
        raise ValueError(f"max_norm must be in (0, inf), got {max_norm!r}")
    return Transformation(
        _nothing, Given(_clip, most), elementwise=True, name=f"clip_by_global_norm({most})"
    )


def chain(*parts: Transformation) -> Optimizer:
    """Put transformations before an optimiser, or after it.

    Each part is given what the one before it returned, the first the gradients, and the
    parameters are moved by what the last one returns.

    Args:
        parts: Transformations, such as `clip_by_global_norm`, and one optimiser.

    Returns:
        An optimiser, with the learning rate of that one.

    Raises:
        TypeError: A part is no transformation.
        ValueError: There is not exactly one optimiser, or two parts have slots of one name.

    Example:
        >>> from topkast_func.training.optim import sgd
        >>> chain(clip_by_global_norm(1.0), sgd(lr=0.1))
        chain(clip_by_global_norm(1.0), sgd(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0))
    """
    for part in parts:
        if not isinstance(part, Transformation):
            check_optimizer(part)
    optimizers = [part for part in parts if isinstance(part, Optimizer)]
    if len(optimizers) != 1:
        raise ValueError(f"chain needs exactly one optimiser, got {len(optimizers)} in {parts}")
    members = tuple(Member(part, tuple(part.init({}).slots)) for part in parts)
    _check_distinct("chain", [kind for member in members for kind in member.kinds])
    return Optimizer(
        Given(_start_chain, parts),
        Given(_chained, members),
        optimizers[0].learning_rate,
        every=optimizers[0].every,
        elementwise=all(part.elementwise for part in parts),
        name=f"chain({', '.join(map(repr, parts))})",
    )


def multi_steps(optimizer: Optimizer, every: int) -> Optimizer:
    """Accumulate gradients: move the parameters at every ``every``-th call, by their mean.

    So ``every`` batches make one update, as one batch as large as all of them would where the
    loss is a mean over a batch. Gradients are gathered on B alone, in float32 (float64 for
    parameters of float64), and follow their weights at a refresh like any slot. `train_step`
    counts updates: ``state.step``, schedules of the learning rate and of sparsities, refreshes
    and ``explore_until`` go by the updates made; a refresh comes before the first batch of one.

    Args:
        optimizer: What moves the parameters.
        every: Calls for one update, at least 1.

    Returns:
        The optimiser. It makes the computations of an update at each call.

    Raises:
        TypeError: ``optimizer`` is none, or ``every`` no integer.
        ValueError: ``every`` is below 1, or the optimiser itself accumulates as many.
    """
    check_optimizer(optimizer)
    every = check_count("every", every, 1)
    kinds = tuple(optimizer.init({}).slots)
    _check_distinct("multi_steps", [_gathered(every), *kinds])
    return Optimizer(
        Given(_start_gathering, (optimizer, every)),
        Given(_gather, (optimizer, every, kinds)),
        Given(_rate_of_updates, (optimizer, every)),
        every=every * optimizer.every,
        elementwise=optimizer.elementwise,
        name=f"multi_steps({optimizer}, every={every})",
    )


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


def _check_distinct(what: str, kinds: list[str]) -> None:
    if repeated := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(f"two parts of {what} have slots {repeated}: give one of them other names")


def _nothing(params: Params) -> OptimizerState:
    return starting({})


def _clip(
    max_norm: float, updates: Params, state: OptimizerState, params: Params
) -> tuple[Tensors, OptimizerState]:
    widened = {name: wide(update) for name, update in updates.items()}
    norms = [torch.linalg.vector_norm(update) for update in widened.values()]
    scale = (max_norm / torch.linalg.vector_norm(torch.stack(norms))).clamp(max=1.0)
    return {n: update * scale for n, update in widened.items()}, state._replace(step=state.step + 1)


def _start_chain(parts: tuple[Transformation, ...], params: Params) -> OptimizerState:
    return starting({k: tree for part in parts for k, tree in part.init(params).slots.items()})


def _chained(
    members: tuple[Member, ...],
    grads: Params,
    state: OptimizerState,
    params: Params,
    lr: Rate | None = None,
) -> tuple[Tensors, OptimizerState]:
    updates, slots = dict(grads), dict(state.slots)
    for part, kinds in members:
        own = OptimizerState(state.step, {kind: state.slots[kind] for kind in kinds})
        rate = (lr,) if isinstance(part, Optimizer) else ()
        updates, after = part.update(updates, own, params, *rate)
        slots.update(after.slots)
    updates = {name: update.to(params[name].dtype) for name, update in updates.items()}
    return updates, OptimizerState(state.step + 1, slots)


def _gathered(every: int) -> str:
    return f"multi_steps({every}).gradient"


def _start_gathering(given: tuple[Optimizer, int], params: Params) -> OptimizerState:
    optimizer, every = given
    gradients = {name: torch.zeros_like(wide(p.detach())) for name, p in params.items()}
    return starting({_gathered(every): gradients, **optimizer.init(params).slots})


def _gather(
    given: tuple[Optimizer, int, tuple[str, ...]],
    grads: Params,
    state: OptimizerState,
    params: Params,
    lr: Rate | None = None,
) -> tuple[Tensors, OptimizerState]:
    optimizer, every, kinds = given
    due = (state.step + 1) % every == 0
    sums = state.slots[_gathered(every)]
    mean = {name: sums[name] + wide(grad) / every for name, grad in grads.items()}
    inner = OptimizerState(state.step // every, {kind: state.slots[kind] for kind in kinds})
    updates, after = optimizer.update(mean, inner, params, lr)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in mean.items()}
    slots = {_gathered(every): _either(due, nothing, mean)}
    for kind in kinds:
        slots[kind] = _either(due, after.slots[kind], state.slots[kind])
    still = {name: torch.zeros_like(update) for name, update in updates.items()}
    return _either(due, updates, still), OptimizerState(state.step + 1, slots)


def _either(due: Tensor, new: Params, old: Params) -> Tensors:
    return {n: torch.where(due.to(tensor.device), tensor, old[n]) for n, tensor in new.items()}


def _rate_of_updates(given: tuple[Optimizer, int], step: Tensor) -> Rate:
    optimizer, every = given
    return optimizer.learning_rate(step // every)


def _grouped(groups: tuple[Group, ...], names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by pattern."""
    found, left = {}, list(names)
    for group in groups:
        found[group.glob] = [name for name in left if group.regex.match(name)]
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
