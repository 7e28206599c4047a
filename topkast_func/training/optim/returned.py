"""What an optimiser returns, checked: its start, and an update."""

import torch
from torch import Tensor

from topkast_func.reading import versions
from topkast_func.training.optim.rates import Rate
from topkast_func.training.optim.transformation import (
    Optimizer,
    OptimizerState,
    cast,
    slots_differ,
)
from topkast_func.trees import check_named, check_text
from topkast_func.types import Params, Tensors, changed


def started(optimizer: Optimizer, params: Params) -> OptimizerState:
    """Return the state before the first update, if it is one.

    Args:
        optimizer: The optimiser.
        params: What is updated.

    Returns:
        What its ``init`` returns.

    Raises:
        TypeError: That is no `OptimizerState`, or its slots are no tensors by name.
        ValueError: It has slots of what is no parameter, without values, or of a kind no file can
            name.
    """
    start = optimizer.init(params)
    told = f"init of {optimizer} must return an OptimizerState"
    if not isinstance(start, OptimizerState):
        raise TypeError(f"{told}, got {type(start).__name__}")
    if not isinstance(start.step, Tensor) or start.step.dtype != torch.int64 or start.step.ndim:
        raise TypeError(f"{told} whose step is an int64 tensor, 0-d, got {start.step!r}")
    check_named(f"{told} whose slots", start.slots, "trees of tensors")
    check_text(f"{told} with slots", start.slots)
    for kind, tree in start.slots.items():
        if not isinstance(tree, dict) or not all(isinstance(s, Tensor) for s in tree.values()):
            raise TypeError(f"{told} whose slots {kind!r} are tensors by the names of parameters")
        if unknown := sorted(tree.keys() - params.keys()):
            raise ValueError(f"{told} whose slots {kind!r} are of parameters, got {unknown}")
        if away := [name for name, slot in tree.items() if slot.is_meta > params[name].is_meta]:
            raise ValueError(f"{told} with values: slots {kind!r} of {away} are on the meta device")
    return start


def updated(
    optimizer: Optimizer, grads: Params, state: OptimizerState, params: Params, lr: Rate
) -> tuple[Tensors, OptimizerState]:
    """Return the updates of one step in the dtypes of the parameters, and the state after it.

    Args:
        optimizer: The optimiser.
        grads: Gradients by name.
        state: What it remembers.
        params: What is updated.
        lr: The learning rate.

    Returns:
        The updates, and the state with ``step`` one more.

    Raises:
        TypeError: ``update`` returns no pair of updates and an `OptimizerState`.
        ValueError: The updates are not one tensor for each parameter, of its shape, or it writes to
            what it is given.
    """
    before = versions(params)
    found = optimizer.update(grads, state, params, lr)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], OptimizerState):
        raise TypeError(f"update of {optimizer} must return (updates, OptimizerState)")
    updates, after = found
    if updates.keys() != params.keys():
        raise ValueError(f"update of {optimizer} must return one for each of {sorted(params)}")
    for name, param in params.items():
        update = updates[name]
        fits = isinstance(update, Tensor) and update.shape == param.shape
        if not fits or update.is_complex() > param.is_complex():
            raise ValueError(
                f"update of {optimizer} must return a tensor for {name!r} of the shape of its "
                f"values, {tuple(param.shape)}, and real where they are"
            )
    if versions(params) != before:
        raise ValueError(f"update of {optimizer} writes to the parameters: return what to add")
    updates = {name: cast(update, params[name].dtype) for name, update in updates.items()}
    return updates, changed(after, step=state.step + 1)


def check_slots(
    optimizer: Optimizer, before: dict[str, Tensors], after: dict[str, Tensors]
) -> None:
    """Check that slots are after an update what they were before it but for their numbers.

    Args:
        optimizer: The optimiser.
        before: Those that it was given.
        after: Those that it returned.

    Raises:
        ValueError: They have other kinds, names, shapes or dtypes.
    """
    if problem := slots_differ(after, before, "those before it"):
        raise ValueError(f"update of {optimizer} must keep what it remembers: {problem}")
