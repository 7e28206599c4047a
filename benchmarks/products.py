"""The three products of a linear layer, one weight at a time, on operands that are packed already.

They are the forward product [batch, out] and the input gradient [batch, in], through A, and the
weight gradient [out, in], whose values outside B may be any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

import topkast_func as tk
from benchmarks.protocol import Parameters, Suite, Tasks
from topkast_func.kernels import engines, pattern_of
from topkast_func.model.alpha import split

ONEDNN = "dense oneDNN"
KINDS = ("forward", "input gradient", "weight gradient")
SHAPES = ((512, 128), (1024, 256), (2048, 512))
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
BLOCKS = ((1, 1), (4, 1), (1, 4), (4, 4), (8, 8), (16, 16))

ROUNDING = 1e-4
"""Largest error over the largest value: sums of 2,048 products in any order."""

Products: TypeAlias = tuple[tuple[Callable[[], Any], Callable[[Any], Tensor]], ...]
"""Each a call, and what makes its output a matrix to compare."""


class Operands(NamedTuple):
    """One weight with the sets of one sparsity, and what it is multiplied with."""

    x: Tensor  # inputs, [batch, in]
    g: Tensor  # gradient of the outputs, [batch, out]
    theta: Tensor  # the weight, dense, [out, in]
    w: Tensor  # the weight on A, zeros elsewhere, [out, in]
    masks: tk.Masks  # A and B, [out, in]
    half: tk.Masks  # B, and an A that is half of it
    block: tuple[int, int]  # shape of the blocks in A and B
    engine: str  # of this library

    def factors(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return what is multiplied with the transpose of what, for each of `KINDS`."""
        return (self.x, self.w), (self.g, self.w.t()), (self.g.t(), self.x.t())


def prepare(p: Parameters) -> Tasks:
    """Return the products of an arm at every sparsity; each checks itself against the dense one.

    Its parameters are ``side`` of a square weight, ``batch``, ``sparsities`` of A, ``way``, and
    where they are not the default ``block_shape``, ``b_over_a``: how many times as large B is, as
    far as there is room, ``engine``, ``device`` and ``dtype``.
    """
    tasks = {}
    block: Any = tuple(p.get("block_shape", (1, 1)))
    for sparsity in p["sparsities"]:
        torch.manual_seed(0)
        x, g, theta = (
            torch.randn(rows, p["side"], device=p.get("device"), dtype=p.get("dtype"))
            for rows in (p["batch"], p["batch"], p["side"])
        )
        of_b = max(0.0, 1 - p.get("b_over_a", 1) * (1 - sparsity))
        masks, half = (sets(theta, of_a, of_b, block) for of_a in (sparsity, (1 + of_b) / 2))
        w = theta * masks.forward
        o = Operands(x, g, theta, w, masks, half, block, p.get("engine", "numba"))
        places = torch.ones(()), torch.ones(()), masks.backward
        found = zip(KINDS, WAYS[p["way"]](o), o.factors(), places, strict=True)
        for kind, (run, matrix), factors, where in found:
            check = partial(_check, factors, where.to(theta), matrix)
            tasks[f"{kind} {sparsity:.0%}"] = run, check
    return tasks


def sets(
    weight: Tensor, forward: float, backward: float, block_shape: tuple[int, int] = (1, 1)
) -> tk.Masks:
    """Choose A and B of one weight, [out, in], at a forward and a backward sparsity."""
    config = tk.TopKastConfig(forward, backward, block_shape=block_shape)
    return tk.compute_masks({"weight": weight}, config)["weight"]


def _check(
    factors: tuple[Tensor, Tensor], where: Tensor, matrix: Callable[[Any], Tensor], output: Any
) -> None:
    exact = functional.linear(*(factor.double() for factor in factors)) * where
    error = (matrix(output) * where - exact).abs().max() / exact.abs().max()
    if not error < ROUNDING:
        raise ArithmeticError(f"the product is wrong by {error:.1e} of its largest value")


def _dense(product: Callable[[Tensor, Tensor], Tensor], o: Operands) -> Products:
    """Compute all three with what returns x·weightᵀ."""
    return tuple((partial(product, *factors), torch.clone) for factors in o.factors())


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·weightᵀ, [..., out], through oneDNN, whatever torch would have chosen."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        by_weight = _onednn(g.flatten(0, -2).t(), x.flatten(0, -2).t())
        return _onednn(g, weight.t()), by_weight


class OneDNNLinear(nn.Module):
    """A linear layer, in the place of another, whose products all run in oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _OneDNN.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product + self.bias


def _masked(o: Operands) -> Products:
    """Put masks on a dense weight and its gradient, each time."""
    return (
        (lambda: functional.linear(o.x, o.theta * o.masks.forward), torch.clone),
        (lambda: o.g @ (o.theta * o.masks.forward), torch.clone),
        (lambda: (o.g.t() @ o.x) * o.masks.backward, torch.clone),
    )


def _torch_csr(o: Operands) -> Products:
    w, w_transposed = o.w.to_sparse_csr(), o.w.t().contiguous().to_sparse_csr()
    x, g = o.x.t().contiguous(), o.g.t().contiguous()
    return (
        (lambda: w @ x, torch.t),
        (lambda: w_transposed @ g, torch.t),
        (partial(torch.sparse.sampled_addmm, w, g, o.x, beta=0.0), Tensor.to_dense),
    )


def _topkast(o: Operands) -> Products:
    """Compute through A; sample the weight gradient on B, of which half is A."""
    engine, (pack, unpack) = engines.engine(o.engine), engines.layout(o.engine)
    x, g, (rows, columns) = pack(o.x), pack(o.g), o.w.shape

    def indexed(masks: tk.Masks) -> tuple[Any, Tensor, Tensor]:
        pattern = pattern_of(*masks, o.block)
        places = pattern.flat_index(o.block, o.w.shape)
        return pattern, places.flatten(), split(o.theta, places)

    (a, _, on_a), (b, places, on_b) = indexed(o.masks), indexed(o.half)

    def spread(found: Tensor) -> Tensor:
        return found.new_zeros(o.w.numel()).index_copy(0, places, found.flatten()).view_as(o.w)

    return (
        (lambda: engine.forward(on_a, x, a, rows), lambda y: unpack(y, len(o.x))),
        (lambda: engine.input_gradient(on_a, g, a, columns), lambda y: unpack(y, len(o.x))),
        (lambda: engine.weight_gradient(g, x, b, on_b), spread),
    )


WAYS: dict[str, Callable[[Operands], Products]] = {
    "dense": partial(_dense, functional.linear),
    ONEDNN: partial(_dense, _onednn),
    "masked": _masked,
    "torch CSR": _torch_csr,
    "topkast": _topkast,
}


def _arms(**told: Any) -> dict[str, Parameters]:
    arms: dict[str, Parameters]
    arms = {way: {**told, "way": way} for way in ("dense", ONEDNN, "torch CSR")}
    for r, c in BLOCKS:
        arms[f"topkast {r}×{c}"] = {**told, "way": "topkast", "block_shape": (r, c)}
    return arms


_CASES = {f"{n}x{n}/{b}": _arms(side=n, batch=b, sparsities=SPARSITIES) for n, b in SHAPES}
SUITE = Suite("products", _CASES, prepare)
