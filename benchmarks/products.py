"""The three products of a linear layer, one weight at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import arms
from benchmarks.multiplication import (
    FORWARD,
    INPUT_GRADIENT,
    LAYER_BACKWARD,
    LAYER_FORWARD,
    OURS,
    WAYS,
    Operands,
)
from benchmarks.protocol import Arm, Case, Parameters, Task

SHAPES = ((512, 128), (1024, 256), (2048, 512))
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
BLOCK_SHAPES = ((1, 1), (4, 1), (1, 4), (4, 4), (8, 8), (16, 16))
QUICK_SHAPES, QUICK_SPARSITIES, QUICK_BLOCK_SHAPES = SHAPES[:1], (0.8, 0.9), ((1, 1), (4, 4))
PEERS = ("dense", "dense oneDNN", "torch CSR", "torch-sparse", "SparseLab")

ROUNDING = 1e-4
"""Largest error over the largest value: sums of 2,048 products in any order, float32."""


def cases(full: bool) -> list[Case]:
    """Return one case for each shape; its tasks are the products at each sparsity.

    Args:
        full: Every shape, sparsity and block shape.

    Returns:
        The cases.
    """
    shapes, sparsities = (SHAPES, SPARSITIES) if full else (QUICK_SHAPES, QUICK_SPARSITIES)
    blocks = BLOCK_SHAPES if full else QUICK_BLOCK_SHAPES
    return [
        Case(
            f"{side}x{side}/{batch}",
            tuple(_arms({"side": side, "batch": batch, "sparsities": sparsities}, blocks)),
        )
        for side, batch in shapes
    ]


def _arms(common: Parameters, blocks: tuple[tuple[int, int], ...]) -> Iterator[Arm]:
    for peer in PEERS:
        yield Arm(peer, {**common, "way": peer})
    for rows, columns in blocks:
        shape = {"block_shape": (rows, columns), "engine": "numba"}
        yield Arm(f"{OURS} {rows}×{columns}", {**common, "way": OURS, **shape})


def prepare(parameters: Parameters) -> list[Task]:
    """Prepare the products of an arm at every sparsity of its case.

    Args:
        parameters: Of the arm.

    Returns:
        Tasks that check their products against the dense ones.
    """
    return [task for s in parameters["sparsities"] for task in _tasks(parameters, s)]


def _tasks(parameters: Parameters, sparsity: float) -> Iterator[Task]:
    o = _operands(parameters, sparsity)
    for name, product in WAYS[parameters["way"]](o).items():
        check = partial(_check, product.matrix, _expected(o, name))
        told = {"product": name, "sparsity": sparsity}
        yield Task(f"{name} {sparsity:.0%}", product.run, check, told)


def _operands(parameters: Parameters, sparsity: float) -> Operands:
    side, batch = parameters["side"], parameters["batch"]
    torch.manual_seed(0)
    x, g, theta = (torch.randn(rows, side) for rows in (batch, batch, side))
    rows, columns = parameters.get("block_shape", (1, 1))
    mask = arms.sets(theta, sparsity, sparsity, (rows, columns)).forward
    return Operands(x, g, theta, theta * mask, mask, sparsity, (rows, columns))


def _expected(o: Operands, product: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what makes, of a product, the two matrices that must agree."""
    if product in {FORWARD, LAYER_FORWARD}:
        return lambda found: (found, functional.linear(o.x, o.w))
    if product in {INPUT_GRADIENT, LAYER_BACKWARD}:
        return lambda found: (found, o.g @ o.w)
    return lambda found: (found * o.mask, (o.g.t() @ o.x) * o.mask)


def _check(
    matrix: Callable[[Any], Tensor],
    expected: Callable[[Tensor], tuple[Tensor, Tensor]],
    output: Any,
) -> None:
    check_close(*expected(matrix(output)))


def check_close(found: Tensor, reference: Tensor) -> None:
    """Check that a product is what another way of computing it gives, but for rounding.

    Args:
        found: The product.
        reference: The same, in the same shape.

    Raises:
        ArithmeticError: It differs by more than `ROUNDING` of the largest value.
    """
    error = ((found - reference).abs().max() / reference.abs().max()).item()
    if not error < ROUNDING:
        raise ArithmeticError(f"the product is wrong by {error:.1e} of its largest value")
