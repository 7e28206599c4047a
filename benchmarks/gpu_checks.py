"""What is to be right on a GPU: products beside float64, sets beside the CPU's, steps.

`benchmarks.gpu` runs it before it measures. On a CPU the products are those of "reference".
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

import topkast_func as tk
from benchmarks.networks import mlp
from topkast_func.kernels import engine, pattern_of
from topkast_func.kernels.pattern import flattened
from topkast_func.model.alpha import split

SIDES = (16, 32, 64, 128)
ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error of a product over its largest value, of operands of a dtype."""

COMPILE: Any = True

Calls: TypeAlias = tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]
"""The forward product, the input gradient, and the weight gradient."""


class Products(NamedTuple):
    """The three products of one layer, by every arm, and what they are made of."""

    dense: Calls
    masked: Calls
    blocks: Calls
    operands: tuple[Tensor, Tensor, Tensor]  # x, g and α
    places: Tensor  # where the values of blocks stand


def products(
    device: str, side: int, batch: int, block: int, sparsity: float, dtype: Any
) -> Products:
    """Return the products of a layer at a sparsity, with a B that is twice as large as A."""
    torch.manual_seed(0)
    x, g, theta = (torch.randn(n, side, device=device, dtype=dtype) for n in (batch, batch, side))
    config = tk.TopKastConfig(sparsity, max(0.0, 2 * sparsity - 1), block_shape=(block, block))
    masks = tk.compute_masks({"weight": theta}, config)["weight"]
    pattern, alpha = pattern_of(*masks, (block, block)), theta * masks.forward
    places = pattern.flat_index((block, block), theta.shape)
    values, run = split(theta, places), engine("triton" if device == "cuda" else "reference")

    def masked() -> Tensor:
        return theta * masks.forward

    return Products(
        (lambda: functional.linear(x, theta), lambda: g @ theta, lambda: g.t() @ x),
        (
            lambda: functional.linear(x, masked()),
            lambda: g @ masked(),
            lambda: (g.t() @ x) * masks.backward,
        ),
        (
            lambda: run.forward(values, x, pattern, side),
            lambda: run.input_gradient(values, g, pattern, side),
            lambda: run.weight_gradient(g, x, pattern, values),
        ),
        (x, g, alpha),
        places,
    )


def errors(made: Products) -> list[float]:
    """Return how far the products of blocks are from those in float64, over the largest value."""
    x, g, alpha = (operand.double() for operand in made.operands)
    exact = (x @ alpha.t(), g @ alpha, (g.t() @ x).flatten()[made.places])
    pairs = zip((call().double() for call in made.blocks), exact, strict=True)
    return [float((found - right).abs().max() / right.abs().max()) for found, right in pairs]


def energy(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the mean square of what a model returns: a loss without targets."""
    return apply(x).float().square().mean()


def check_products(device: str, dtype: torch.dtype, block: int, batch: int) -> None:
    """Raise where a product is wrong."""
    wrong = errors(products(device, 6 * block, batch, block, 0.7, dtype))
    if not all(error < ROUNDING[dtype] for error in wrong):
        raise ArithmeticError(f"wrong by {wrong} of the largest value")


def check_sets(device: str) -> None:
    """Raise where sets, with ties, or their patterns are not those of the CPU."""
    theta = torch.randn(512, 384).mul(4).round()
    for method in (tk.topkast(), tk.random_backward(), tk.set()):
        config = tk.TopKastConfig(0.9, 0.8, method=method)
        here, there = (tk.compute_masks({"weight": t}, config) for t in (theta, theta.to(device)))
        found, expected = (flattened(pattern_of(*masks["weight"])) for masks in (there, here))
        if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
            raise ArithmeticError(f"other sets by {method}")


def check_training(device: str, storage: Any, block: int, dtype: torch.dtype) -> None:
    """Raise where a compiled step is not the eager one, or where an eager one waits."""
    torch.manual_seed(0)
    model = mlp(128, 256, 64).to(device, dtype)
    config = tk.TopKastConfig(0.7, 0.4, block_shape=(block, block), refresh_every=3)
    optimizer, batch = tk.sgd(10.0), torch.randn(48, 128, device=device, dtype=dtype)
    ends = []
    for compile in (False, COMPILE):
        step = tk.make_train_step(model, energy, config, optimizer, compile=compile)
        state = tk.init_state(model, config, optimizer, storage=storage)
        for number in range(6):
            waits = compile or number not in (1, 2)  # it refreshes before the next, and may wait
            torch.cuda.set_sync_debug_mode("default" if waits else "error")
            state, _ = step(state, batch)
            torch.cuda.set_sync_debug_mode("default")
            if number == 2:  # later, sets that are chosen from rounded numbers may differ
                ends.append(tk.dense_params(state))
    before = dict(model.named_parameters())
    for name, (a, b) in {n: (ends[0][n].float(), ends[1][n].float()) for n in ends[0]}.items():
        moved = (a - before[name].float()).abs().max()
        rounding = 4 * torch.finfo(dtype).eps * a.abs().max()
        if not moved > 2 * rounding or not (a - b).abs().max() <= rounding:
            raise ArithmeticError(f"{name}: compiled and eager steps differ")


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what is to be right, by name."""
    tried = [(torch.bfloat16, block, 300) for block in (*SIDES, 48)]
    for case in (*tried, (torch.bfloat16, 32, 1), (torch.float16, 32, 37), (torch.float32, 32, 37)):
        yield "products {} {} {}".format(*case), partial(check_products, device, *case)
    yield "sets", partial(check_sets, device)
    for kind in (("compact", 32), ("compact", 1), ("dense", 1)):
        dtype = torch.float32 if kind == ("compact", 1) else torch.bfloat16
        yield "training {} {}".format(*kind), partial(check_training, device, *kind, dtype)
