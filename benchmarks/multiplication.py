"""How each arm multiplies: one weight with the sets of one sparsity, three products."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import arms
from benchmarks.peers import onednn_product

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"
LAYER_FORWARD, LAYER_BACKWARD = "layer forward", "layer backward"
OURS = "topkast"

GATHERED_ENTRIES = 2**27
"""torch-sparse writes out one row of the batch per entry; beyond 0.5 GB of that it is left out."""


class Operands(NamedTuple):
    """One weight with the sets of one sparsity, and what it is multiplied with.

    Attributes:
        x: Inputs, [batch, in].
        g: Gradient of the outputs, [batch, out].
        theta: The weight, dense, [out, in].
        w: The weight on A, zeros elsewhere, [out, in].
        mask: 1_A, [out, in].
        sparsity: Fraction of zeros in w.
        block_shape: Of the blocks in A.
    """

    x: Tensor
    g: Tensor
    theta: Tensor
    w: Tensor
    mask: Tensor
    sparsity: float
    block_shape: tuple[int, int]


class Product(NamedTuple):
    """One product of an arm: a call, and what makes its output a matrix to compare.

    The matrices are [batch, out], [batch, in] and, with any values outside A, [out, in].
    """

    run: Callable[[], Any]
    matrix: Callable[[Any], Tensor]


Multiply: TypeAlias = Callable[[Operands], dict[str, Product]]


def _same(output: Tensor) -> Tensor:
    return output


def _transposed(output: Tensor) -> Tensor:
    return output.t()


def _dense(o: Operands) -> dict[str, Product]:
    layer = _layer(o, o.w, functional.linear, _same)
    return {
        FORWARD: Product(lambda: functional.linear(o.x, o.w), _same),
        INPUT_GRADIENT: Product(lambda: o.g @ o.w, _same),
        WEIGHT_GRADIENT: Product(lambda: o.g.t() @ o.x, _same),
        **layer,
    }


def _layer(
    o: Operands,
    values: Tensor,
    linear: Callable[[Tensor, Tensor], Tensor],
    matrix: Callable[[Tensor], Tensor],
) -> dict[str, Product]:
    """Return the products of a differentiable layer: forward, and both gradients together."""
    x, leaf = o.x.clone().requires_grad_(), values.clone().requires_grad_()
    y = linear(x, leaf)

    def both_gradients() -> Tensor:
        gradient, _ = torch.autograd.grad(y, (x, leaf), o.g, retain_graph=True)
        return gradient

    return {
        LAYER_FORWARD: Product(lambda: linear(o.x, values), matrix),
        LAYER_BACKWARD: Product(both_gradients, matrix),
    }


def _onednn(o: Operands) -> dict[str, Product]:
    return {
        FORWARD: Product(lambda: onednn_product(o.x, o.w), _same),
        INPUT_GRADIENT: Product(lambda: onednn_product(o.g, o.w.t()), _same),
        WEIGHT_GRADIENT: Product(lambda: onednn_product(o.g.t(), o.x.t()), _same),
    }


def _torch_csr(o: Operands) -> dict[str, Product]:
    w, w_transposed = o.w.to_sparse_csr(), o.w.t().contiguous().to_sparse_csr()
    x, g = o.x.t().contiguous(), o.g.t().contiguous()
    sampled = partial(torch.sparse.sampled_addmm, w, g, o.x, beta=0.0)
    return {
        FORWARD: Product(lambda: w @ x, _transposed),
        INPUT_GRADIENT: Product(lambda: w_transposed @ g, _transposed),
        WEIGHT_GRADIENT: Product(sampled, Tensor.to_dense),
    }


def _torch_sparse(o: Operands) -> dict[str, Product]:
    """Use `spmm` forward, and its autograd for either gradient."""
    if int(o.mask.sum()) * len(o.x) > GATHERED_ENTRIES:
        return {}
    spmm = import_module("torch_sparse").spmm
    index, values = o.mask.nonzero().t().contiguous(), o.w[o.mask].requires_grad_()
    x, g = o.x.t().contiguous().requires_grad_(), o.g.t().contiguous()
    multiply = partial(spmm, index, values, *o.w.shape, x)
    y = multiply()

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(y, of, g, retain_graph=True)[0]

    def scattered(found: Tensor) -> Tensor:
        return torch.zeros_like(o.w).masked_scatter(o.mask, found)

    return {
        FORWARD: Product(torch.no_grad()(multiply), _transposed),
        INPUT_GRADIENT: Product(partial(gradient, x), _transposed),
        WEIGHT_GRADIENT: Product(partial(gradient, values), scattered),
    }


def _sparselab(o: Operands) -> dict[str, Product]:
    """Call what its autograd function calls, with the transpose made before."""
    sparselab, core = import_module("sparselab"), import_module("sparselab._core")
    w = sparselab.PaddedCSR.from_dense(o.w)
    w_transposed = w.transpose()
    x, g = o.x.t().contiguous(), o.g.t().contiguous()

    def scattered(slots: Any) -> Tensor:
        rows, columns = np.repeat(np.arange(w.nrows), w.row_capacity), np.asarray(w.col_indices)
        matrix, live = np.zeros(o.w.shape, np.float32), columns >= 0
        matrix[rows[live], columns[live]] = slots[live]
        return torch.from_numpy(matrix)

    return {
        FORWARD: Product(lambda: sparselab.spmm(w, x), _transposed),
        INPUT_GRADIENT: Product(lambda: sparselab.spmm(w_transposed, g), _transposed),
        WEIGHT_GRADIENT: Product(lambda: core.spmm_grad_w_simd(w, g.numpy(), x.numpy()), scattered),
    }


def _ours(o: Operands) -> dict[str, Product]:
    # The weight gradient at a density is sampled on a B of that density, of which A is one half;
    # the layer computes with A of the density and learns on a B of twice that.
    density = 1.0 - o.sparsity
    a_alone = _products(o, o.sparsity, o.sparsity)
    half_of_b = _products(o, 1.0 - density / 2, o.sparsity)
    twice_a = _products(o, o.sparsity, max(0.0, 1.0 - 2 * density))
    return {
        FORWARD: Product(a_alone.forward, a_alone.unpack),
        INPUT_GRADIENT: Product(a_alone.input_gradient, a_alone.unpack),
        WEIGHT_GRADIENT: Product(half_of_b.weight_gradient, partial(_spread, o, half_of_b)),
        **_layer(o, twice_a.values, twice_a.layer, _same),
    }


def _products(o: Operands, forward: float, backward: float) -> arms.Products:
    masks = arms.sets(o.theta, forward, backward, o.block_shape)
    return arms.products(o.theta, masks, o.x, o.g, o.block_shape, "numba")


def _spread(o: Operands, products: arms.Products, found: Tensor) -> Tensor:
    """Put values on B to their places: the places are what gathering the places gives."""
    places = products.gather(torch.arange(o.w.numel(), dtype=torch.float64).view_as(o.w)).long()
    return torch.zeros(o.w.numel()).index_copy(0, places.flatten(), found.flatten()).view_as(o.w)


WAYS: dict[str, Multiply] = {
    "dense": _dense,
    "dense oneDNN": _onednn,
    "torch CSR": _torch_csr,
    "torch-sparse": _torch_sparse,
    "SparseLab": _sparselab,
    OURS: _ours,
}
