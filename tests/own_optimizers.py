"""Optimisers as a user would write them, with slots of any shape."""

from typing import Any

import torch
from torch import Tensor

import topkast_func as tk
from topkast_func.types import Params

Tree = dict[str, Tensor]


def factored(lr: float, decay: float = 0.9) -> tk.Optimizer:
    """Adafactor without its extras (Shazeer and Stern, 2018, algorithm 1).

    The second moment of a matrix is kept as its row means and its column means; v̂ is their
    product over the mean of the rows. Vectors keep one number.
    """

    def second_moment(square: Tensor, kept: Tree) -> tuple[Tensor, Tree]:
        means = {"row": square.mean(-1), "column": square.mean(-2) if square.ndim > 1 else square}
        now = {k: decay * kept[k] + (1.0 - decay) * means[k].reshape(kept[k].shape) for k in kept}
        if square.ndim == 1:
            return now["row"], now
        return now["row"][:, None] * now["column"] / now["row"].mean(), now

    def init(params: Params) -> tk.OptimizerState:
        slots = {
            "row": {n: p.new_zeros(p.shape[:-1]) for n, p in params.items()},
            "column": {n: p.new_zeros(p.shape[1:]) for n, p in params.items() if p.ndim > 1},
        }
        return tk.OptimizerState(torch.zeros((), dtype=torch.int64), slots)

    def update(
        grads: Tree, state: tk.OptimizerState, params: Tree, lr: Any = None
    ) -> tuple[Tree, tk.OptimizerState]:
        updates: Tree = {}
        slots: dict[str, Tree] = {"row": {}, "column": {}}
        for name, grad in grads.items():
            kept = {kind: tree[name] for kind, tree in state.slots.items() if name in tree}
            moment, kept = second_moment(grad.square(), kept)
            updates[name] = -lr * grad / (moment.sqrt() + 1e-8)
            for kind, slot in kept.items():
                slots[kind][name] = slot
        return updates, tk.OptimizerState(state.step + 1, slots)

    def learning_rate(step: Tensor) -> Tensor:
        return torch.tensor(lr, dtype=torch.float64)

    return tk.Optimizer(init, update, learning_rate, name=f"factored(lr={lr})")


def normalized(lr: float, shape: tuple[int, ...] = ()) -> tk.Optimizer:
    """Divide the gradient of each parameter by the largest norm it has had, one number of it."""

    def init(params: Params) -> tk.OptimizerState:
        largest = {n: torch.zeros(shape, dtype=torch.float64) for n in params}
        return tk.OptimizerState(torch.zeros((), dtype=torch.int64), {"largest": largest})

    def update(
        grads: Tree, state: tk.OptimizerState, params: Tree, lr: Any = None
    ) -> tuple[Tree, tk.OptimizerState]:
        largest = {
            n: torch.maximum(state.slots["largest"][n], grad.double().norm())
            for n, grad in grads.items()
        }
        updates = {n: (-lr * grad / largest[n].reshape(())) for n, grad in grads.items()}
        return updates, tk.OptimizerState(state.step + 1, {"largest": largest})

    def learning_rate(step: Tensor) -> Tensor:
        return torch.tensor(lr, dtype=torch.float64)

    return tk.Optimizer(
        init, update, learning_rate, elementwise=True, name=f"normalized(lr={lr}, shape={shape})"
    )
