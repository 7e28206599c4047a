"""x·αᵀ for inference, of α in CSR or BSR, by whatever is the fastest for the rows at hand."""

import math
from typing import Any

import torch
from torch import Tensor

from topkast_func.kernels.engines import installed
from topkast_func.kernels.layouts import csr_matrix
from topkast_func.kernels.library import define
from topkast_func.kernels.pattern import BlockRows, block_of
from topkast_func.kernels.soundness import check_indices
from topkast_func.kernels.tiles import pack, unpack

VECTORS, NUMBA_FROM = 2, 16
"""Rows of activations up to which each is a product of its own, and from which on they fill a tile
of the kernels."""


def supported(dtype: torch.dtype, device: str) -> bool:
    """Return whether sparse products support a dtype on a type of device."""
    return device == "cpu" and dtype in (torch.float32, torch.float64)


def pays(shape: tuple[int, int], stored: int, batch: int, dtype: torch.dtype, device: str) -> bool:
    """Return whether a matrix is smaller and faster sparse than dense.

    The estimate, in nanoseconds, is a fit to one thread of a processor with AVX-512, of layers that
    together do not fit its cache.

    Args:
        shape: Rows and columns.
        stored: Entries that are stored.
        batch: Rows of activations.
        dtype: Of the values.
        device: Type of the device.

    Returns:
        Whether it pays.
    """
    if not supported(dtype, device):
        return False
    entries = math.prod(shape)
    dense = entries * (0.35 + 0.02 * batch)
    few = 35e3 + stored * (0.4 * batch if batch <= VECTORS else 0.8 + 0.05 * batch)
    many = 50e3 + stored * 0.65 * -(-batch // 16) + 2.5 * batch * sum(shape)
    sparse = many if batch >= NUMBA_FROM and installed("numba") else few
    return 2 * stored < entries and sparse < dense


def _compute(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, features: int) -> Tensor:
    x = x.detach()
    check_indices(rows, columns, features // block_of(values)[0], x.shape[1] // block_of(values)[1])
    if values.ndim == 3 or (x.shape[0] >= NUMBA_FROM and installed("numba")):
        from topkast_func.kernels import numba_cpu

        part = BlockRows(rows, columns)
        return unpack(numba_cpu.rows_times(values, pack(x), part, features), x.shape[0])
    matrix = csr_matrix(rows, columns, values, (features, x.shape[1]))
    if 0 < x.shape[0] <= VECTORS:
        return torch.stack([torch.mv(matrix, row) for row in x])
    return (matrix @ x.t()).t().contiguous()


def _fake(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, features: int) -> Tensor:
    return x.new_empty(x.shape[0], features)


def batched(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """Batch a product in one call; it is the activations that are batched."""
    x, *matrix, features = arguments
    x = x.movedim(in_dims[0], 0)
    y = operator(x.flatten(0, 1), *matrix, features)
    return y.unflatten(0, (info.batch_size, -1)), 0


product = define(
    "apply(Tensor x, Tensor values, Tensor rows, Tensor columns, int features) -> Tensor",
    _compute,
    _fake,
    batched=batched,
)
"""``product(x, values, crow_indices, col_indices, out_features)``: x·αᵀ of x [batch, in], with
values [stored] or [blocks, r, c] and int32 indices. It has no gradient."""
