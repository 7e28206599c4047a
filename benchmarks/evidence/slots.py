"""Adam in which the slots of what newly enters B begin otherwise, to see what that is worth."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import topkast_func as tk
from topkast_func.types import Params, Tensors

EPS = 1e-8


def adam(rate: Callable[[Tensor], Tensor], betas: tuple[float, float], start: str) -> tk.Optimizer:
    """Return Adam whose bias is corrected by the age of an entry in B, or that begins unbiased.

    At "age" each entry counts its own steps, in a slot. At "mean" the second moment of what
    newly enters begins at the mean of the others of its tensor.
    """
    update = {"age": _by_age, "mean": _from_mean}[start]
    return tk.Optimizer(_init, partial(_update, update, rate, betas), rate, elementwise=True)


def _init(params: Params) -> tk.OptimizerState:
    kinds = ("slots.exp_avg", "slots.exp_avg_sq", "slots.age")
    slots = {kind: {name: torch.zeros_like(p) for name, p in params.items()} for kind in kinds}
    return tk.OptimizerState(torch.zeros((), dtype=torch.int64, device="cpu"), slots)


def _update(
    update: Callable[..., tuple[Tensor, ...]],
    rate: Callable[[Tensor], Tensor],
    betas: tuple[float, float],
    grads: Params,
    state: tk.OptimizerState,
    params: Params,
    lr: Tensor | None = None,
) -> tuple[Tensors, tk.OptimizerState]:
    lr = rate(state.step) if lr is None else lr
    updates: Tensors = {}
    slots: dict[str, Tensors] = {kind: {} for kind in state.slots}
    for name, grad in grads.items():
        held = (tree[name] for tree in state.slots.values())
        direction, *new = update(grad, *held, betas, state.step + 1)
        updates[name] = -lr * direction
        for tree, slot in zip(slots.values(), new, strict=True):
            tree[name] = slot
    return updates, tk.OptimizerState(state.step + 1, slots)


def _by_age(
    grad: Tensor, mean: Tensor, square: Tensor, age: Tensor, betas: tuple[float, float], t: Tensor
) -> tuple[Tensor, ...]:
    return _direction(grad, mean, square, age + 1, betas, age + 1)


def _from_mean(
    grad: Tensor, mean: Tensor, square: Tensor, age: Tensor, betas: tuple[float, float], t: Tensor
) -> tuple[Tensor, ...]:
    others = square.sum() / square.count_nonzero().clamp(min=1)
    return _direction(grad, mean, torch.where(square == 0, others, square), age, betas, t)


def _direction(
    grad: Tensor, mean: Tensor, square: Tensor, age: Tensor, betas: tuple[float, float], t: Tensor
) -> tuple[Tensor, ...]:
    mean = torch.lerp(mean, grad, 1 - betas[0])
    square = betas[1] * square + (1 - betas[1]) * grad * grad
    first, second = 1 - betas[0] ** t, 1 - betas[1] ** t
    return mean / first / ((square / second).sqrt() + EPS), mean, square, age
