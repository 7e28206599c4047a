"""What is compared: training with this library, and the layers of others."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import topkast_func as tk
from benchmarks.networks import Problem
from benchmarks.protocol import Parameters

ONEDNN = "dense oneDNN"
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(tk.sgd, momentum=0.9),
    "adam": tk.adam,
    "adamw": tk.adamw,
}


class Training(NamedTuple):
    """A training under way: one step, which returns its loss; the state; the configuration."""

    step: Callable[[], Tensor]
    state: Callable[[], tk.TrainState]
    config: tk.TopKastConfig


def sets(
    weight: Tensor, forward: float, backward: float, block_shape: tuple[int, int] = (1, 1)
) -> tk.Masks:
    """Choose A and B of one weight, [out, in], at a forward and a backward sparsity."""
    config = tk.TopKastConfig(forward, backward, block_shape=block_shape)
    return tk.compute_masks({"weight": weight}, config)["weight"]


def training(problem: Problem, p: Parameters, **options: Any) -> Training:
    """Start a training of a network; options are those of `tk.make_train_step`.

    Its parameters are ``forward_sparsity``, ``backward_sparsity``, ``optimizer``, and where they
    are not the default ``block_shape``, ``penalty``, ``storage``, ``lr``, and ``refresh_every``.
    Weights that the blocks do not divide stay dense.
    """
    rows, columns = p.get("block_shape", (1, 1))
    weights = {n: w.shape for n, w in problem.model.named_parameters() if w.ndim > 1}
    config = tk.TopKastConfig(
        p["forward_sparsity"],
        p["backward_sparsity"],
        sparse=[n for n, shape in weights.items() if shape[0] % rows == 0 == shape[1] % columns],
        refresh_every=p.get("refresh_every"),
        penalty=p.get("penalty"),
        block_shape=(rows, columns),
    )
    optimizer = OPTIMIZERS[p["optimizer"]](p.get("lr", 1e-3))
    state = tk.init_state(problem.model, config, optimizer, storage=p.get("storage", "compact"))
    train_step = tk.make_train_step(problem.model, _loss, config, optimizer, **options)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, (problem.inputs, problem.targets))
        return metrics.loss

    return Training(step, lambda: state, config)


def _loss(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(apply(batch[0]), batch[1])


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·weightᵀ, [..., out], through oneDNN, whatever torch would have chosen."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        flat = g.flatten(0, -2), x.flatten(0, -2)
        return onednn_product(g, weight.t()), onednn_product(flat[0].t(), flat[1].t())


class OneDNNLinear(nn.Module):
    """A linear layer, in the place of another, whose products all run in oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _OneDNN.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product + self.bias


def sparselab(linear: nn.Linear, sparsity: float) -> nn.Module:
    """Return SparseLab's layer of the same shape, with weights that it draws; A is its B."""
    sizes = linear.in_features, linear.out_features
    layer: nn.Module = import_module("sparselab").SparseLinear(*sizes, sparsity=sparsity)
    return layer
