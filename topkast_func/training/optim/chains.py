"""Transformations before and after an optimiser: chain, clip_by_global_norm."""

from typing import NamedTuple

from topkast_func.checks import check_real
from topkast_func.training.optim.norms import global_norm
from topkast_func.training.optim.rates import Rate
from topkast_func.training.optim.transformation import (
    Given,
    Optimizer,
    OptimizerState,
    Transformation,
    check_distinct,
    check_optimizer,
    starting,
    wide,
)
from topkast_func.types import Params, Tensors, changed


class Member(NamedTuple):
    """A part of a chain.

    Attributes:
        part: A transformation, or the optimiser.
        kinds: The kinds of slots that are its own.
    """

    part: Transformation
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
        >>> import torch
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
    check_distinct("chain", [kind for member in members for kind in member.kinds])
    return Optimizer(
        Given(_start_chain, parts),
        Given(_chained, members),
        optimizers[0].learning_rate,
        every=optimizers[0].every,
        elementwise=all(part.elementwise for part in parts),
        name=f"chain({', '.join(map(repr, parts))})",
    )


def _nothing(params: Params) -> OptimizerState:
    return starting({})


def _clip(
    max_norm: float, updates: Params, state: OptimizerState, params: Params
) -> tuple[Tensors, OptimizerState]:
    widened = {name: wide(update) for name, update in updates.items()}
    scale = (max_norm / global_norm(widened)).clamp(max=1.0)
    return {n: update * scale for n, update in widened.items()}, changed(state, step=state.step + 1)


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
