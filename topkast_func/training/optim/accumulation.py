"""Updates of several batches each: multi_steps."""

import torch
from torch import Tensor

from topkast_func.checks import check_count
from topkast_func.training.optim.rates import Rate
from topkast_func.training.optim.transformation import (
    Given,
    Optimizer,
    OptimizerState,
    check_distinct,
    check_optimizer,
    starting,
    wide,
)
from topkast_func.types import Params, Tensors


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
    calls = check_count("every times that of the optimiser", every * optimizer.every, 1)
    kinds = tuple(optimizer.init({}).slots)
    check_distinct("multi_steps", [_gathered(every), *kinds])
    return Optimizer(
        Given(_start_gathering, (optimizer, every)),
        Given(_gather, (optimizer, every, kinds)),
        Given(_rate_of_updates, (optimizer, every)),
        every=calls,
        elementwise=optimizer.elementwise,
        name=f"multi_steps({optimizer}, every={every})",
    )


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
