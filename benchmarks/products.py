"""The three products of a linear layer, one weight at a time, on operands that are packed already.

They are the forward product [batch, out] and the input gradient [batch, in], through A, and the
weight gradient [out, in], whose values outside A may be any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.arms import onednn_product, sets
from benchmarks.protocol import Parameters, Suite, Tasks
from topkast_func.kernels import engines, pattern_of
from topkast_func.model.alpha import split

KINDS = ("forward", "input gradient", "weight gradient")
SHAPES = ((512, 128), (1024, 256), (2048, 512))
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
BLOCKS = ((1, 1), (4, 1), (1, 4), (4, 4), (8, 8), (16, 16))

ROUNDING = 1e-4
"""Largest error over the largest value: sums of 2,048 products in any order, float32."""

Products: TypeAlias = tuple[tuple[Callable[[], Any], Callable[[Any], Tensor]], ...]
"""Each a call, and what makes its output a matrix to compare."""


class Operands(NamedTuple):
    """One weight with the sets of one sparsity, and what it is multiplied with."""

    x: Tensor  # inputs, [batch, in]
    g: Tensor  # gradient of the outputs, [batch, out]
    theta: Tensor  # the weight, dense, [out, in]
    w: Tensor  # the weight on A, zeros elsewhere, [out, in]
    mask: Tensor  # 1_A, [out, in]
    sparsity: float  # fraction of zeros in w
    block: tuple[int, int]  # shape of the blocks in A


def _arms(side: int, batch: int) -> dict[str, Parameters]:
    ways: dict[str, Parameters] = {way: {"way": way} for way in list(WAYS)[:-1]}
    for block in BLOCKS:
        ways[f"topkast {block[0]}×{block[1]}"] = {"way": "topkast", "block_shape": block}
    told = {"side": side, "batch": batch, "sparsities": SPARSITIES}
    return {name: {**told, **way} for name, way in ways.items()}


def prepare(parameters: Parameters) -> Tasks:
    """Return the products of an arm at every sparsity; each checks itself against the dense one."""
    return {k: t for s in parameters["sparsities"] for k, t in _tasks(parameters, s).items()}


def _tasks(parameters: Parameters, sparsity: float) -> Tasks:
    side, batch = parameters["side"], parameters["batch"]
    torch.manual_seed(0)
    x, g, theta = (torch.randn(rows, side) for rows in (batch, batch, side))
    block: Any = tuple(parameters.get("block_shape", (1, 1)))
    mask = sets(theta, sparsity, sparsity, block).forward
    o = Operands(x, g, theta, theta * mask, mask, sparsity, block)
    places = (torch.ones(()), torch.ones(()), mask)
    products = zip(KINDS, WAYS[parameters["way"]](o), _dense(o), places, strict=True)
    return {
        f"{kind} {sparsity:.0%}": (run, partial(_check, matrix, reference, where))
        for kind, (run, matrix), (reference, _), where in products
    }


def _check(matrix: Any, reference: Callable[[], Tensor], where: Tensor, output: Any) -> None:
    found, expected = matrix(output) * where, reference() * where
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < ROUNDING:
        raise ArithmeticError(f"the product is wrong by {error:.1e} of its largest value")


def _dense(o: Operands) -> Products:
    return (
        (lambda: functional.linear(o.x, o.w), torch.clone),
        (lambda: o.g @ o.w, torch.clone),
        (lambda: o.g.t() @ o.x, torch.clone),
    )


def _onednn(o: Operands) -> Products:
    return (
        (lambda: onednn_product(o.x, o.w), torch.clone),
        (lambda: onednn_product(o.g, o.w.t()), torch.clone),
        (lambda: onednn_product(o.g.t(), o.x.t()), torch.clone),
    )


def _torch_csr(o: Operands) -> Products:
    w, w_transposed = o.w.to_sparse_csr(), o.w.t().contiguous().to_sparse_csr()
    x, g = o.x.t().contiguous(), o.g.t().contiguous()
    return (
        (lambda: w @ x, torch.t),
        (lambda: w_transposed @ g, torch.t),
        (partial(torch.sparse.sampled_addmm, w, g, o.x, beta=0.0), Tensor.to_dense),
    )


def _ours(o: Operands) -> Products:
    """Compute with A of a density; sample the weight gradient on a B of it, half of it A."""
    engine, (pack, unpack) = engines.engine("numba"), engines.layout("numba")
    x, g, (rows, columns) = pack(o.x), pack(o.g), o.w.shape

    def indexed(forward: float) -> tuple[Any, Tensor, Tensor]:
        masks = sets(o.theta, forward, o.sparsity, o.block)
        pattern = pattern_of(*masks, o.block)
        places = pattern.flat_index(o.block, o.w.shape)
        return pattern, places.flatten(), split(o.theta, places)

    (a, _, on_a), (b, places, on_b) = indexed(o.sparsity), indexed((1 + o.sparsity) / 2)

    def spread(found: Tensor) -> Tensor:
        return torch.zeros(o.w.numel()).index_copy(0, places, found.flatten()).view_as(o.w)

    def unpacked(found: Tensor) -> Tensor:
        return unpack(found, len(o.x))

    return (
        (lambda: engine.forward(on_a, x, a, rows), unpacked),
        (lambda: engine.input_gradient(on_a, g, a, columns), unpacked),
        (lambda: engine.weight_gradient(g, x, b, on_b), spread),
    )


WAYS = {"dense": _dense, "dense oneDNN": _onednn, "torch CSR": _torch_csr, "topkast": _ours}
_CASES = {f"{side}x{side}/{batch}": _arms(side, batch) for side, batch in SHAPES}
SUITE = Suite("products", _CASES, prepare)
