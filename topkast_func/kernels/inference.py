"""x·αᵀ for inference, of α in CSR or BSR, by whatever is the fastest for the rows at hand."""

import math
from typing import Any

import torch
from torch import Tensor

from topkast_func.checks import check_type
from topkast_func.kernels.engines import installed
from topkast_func.kernels.layouts import csr_matrix
from topkast_func.kernels.library import Gradient, define, one_by_one
from topkast_func.kernels.pattern import BlockRows, block_of, flat
from topkast_func.kernels.soundness import check_indices
from topkast_func.kernels.tiles import pack, unpack
from topkast_func.places import gathered, placed

FEW, NUMBA_FROM = 4, 16
"""Rows of activations up to which a kernel has them side by side, and from which on they fill a
tile of others."""


def supported(dtype: torch.dtype, device: str) -> bool:
    """Return whether sparse products support a dtype on a type of device."""
    return device == "cpu" and dtype in (torch.float32, torch.float64)


def pays(shape: tuple[int, int], stored: int, batch: int, dtype: torch.dtype, device: str) -> bool:
    """Return whether a matrix is smaller and faster sparse than dense.

    The estimate, in nanoseconds, is a fit to one thread of a processor with AVX-512, of a layer
    that fits its cache: where layers do not, what is smaller gains more. Threads share the work of
    any product but that of few rows with a dense matrix, which waits for memory.

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
    dense = entries * min(0.08 * batch, 0.28 + 0.02 * batch)
    alone = (0.07 + 0.2 * batch) / torch.get_num_threads()
    few = 28e3 + stored * (alone if batch <= FEW else 0.8 + 0.05 * batch)
    many = 50e3 + stored * 0.65 * -(-batch // 16) + 2.5 * batch * sum(shape)
    sparse = many if batch >= NUMBA_FROM and installed("numba") else few
    return 2 * stored < entries and sparse < dense


def check_bias(bias: Tensor, values: Tensor, features: int) -> None:
    """Check that a bias goes with a matrix.

    Args:
        bias: The bias.
        values: Those of the matrix.
        features: Rows of the matrix.

    Raises:
        TypeError: It is no tensor of the dtype of the values.
        ValueError: It has not as many entries as the matrix has rows.
    """
    check_type("bias", bias, Tensor)
    if bias.dtype != values.dtype:
        raise TypeError(f"bias is {bias.dtype}, the weight is {values.dtype}")
    if bias.shape != (features,):
        raise ValueError(f"bias must be of shape ({features},), got {tuple(bias.shape)}")


def _compute(
    x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, features: int
) -> Tensor:
    x, values, bias = x.detach(), values.detach(), None if bias is None else bias.detach()
    if bias is not None:
        check_bias(bias, values, features)
    height, width = block_of(values)
    check_indices(values, rows, columns, (features // height, x.shape[1] // width))
    if values.ndim == 3 or (x.shape[0] >= NUMBA_FROM and installed("numba")):
        y = _by_tiles(x, values, BlockRows(rows, columns), features)
        return y if bias is None else y.add_(bias)
    if 0 < x.shape[0] <= FEW and installed("numba"):
        from topkast_func.kernels.few_rows import few_rows_times

        return few_rows_times(x, values, rows, columns, bias, features)
    matrix = csr_matrix(rows, columns, values, (features, x.shape[1]))
    with torch.autocast("cpu", enabled=False):
        y = (matrix @ x.t()).t().contiguous()
    return y if bias is None else y.add_(bias)


def _by_tiles(x: Tensor, values: Tensor, part: BlockRows, features: int) -> Tensor:
    from topkast_func.kernels import numba_cpu
    from topkast_func.kernels.transpose import transposed

    y = numba_cpu.rows_times(values, pack(x, transposed), part, features)
    return unpack(y, x.shape[0], transposed)


def _fake(
    x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, features: int
) -> Tensor:
    return x.new_empty(x.shape[0], features)


class _Apply(Gradient):
    """Derivatives by the dense matrix, which is put together where one is asked for."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, values, rows, columns, _, ctx.features = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, values, rows, columns)
        ctx.save_for_forward(x, values, rows, columns)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        x, values, *index = ctx.saved_tensors
        for_x = for_values = for_bias = None
        if g is not None:
            shape = ctx.features, x.shape[1]
            if ctx.needs_input_grad[1]:
                for_x = g @ dense_matrix(values, *index, shape)
            if ctx.needs_input_grad[2]:
                for_values = gathered(g.t() @ x, places_of(values, *index, shape))
            if ctx.needs_input_grad[5]:
                for_bias = g.sum(0)
        return None, for_x, for_values, None, None, for_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x, values, *index), (_, of_x, of_values, _, _, of_bias, _) = ctx.saved_tensors, tangents
        moved = x.new_zeros(x.shape[0], ctx.features)
        if of_x is not None:
            moved = product(of_x, values, *index, None, ctx.features)
        if of_values is not None:
            moved = moved + x @ dense_matrix(of_values, *index, (ctx.features, x.shape[1])).t()
        return moved if of_bias is None else moved + of_bias


def dense_matrix(values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a matrix in CSR or BSR as a dense one; autograd follows it.

    Args:
        values: [stored] or [blocks, r, c].
        rows: Where each row (of blocks) starts, int32.
        columns: Column (of blocks) of each, int32.
        shape: Rows and columns.

    Returns:
        The matrix.
    """
    return placed(values, places_of(values, rows, columns, shape), shape)


def places_of(values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return where the values of a matrix in CSR or BSR stand in the flat one, in their shape."""
    return flat(BlockRows(rows, columns), block_of(values), shape).view(values.shape)


def batched(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """Batch a product in one call, where the activations alone are batched."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        return one_by_one(operator, info, in_dims, *arguments)
    x, *matrix, features = arguments
    x = x.movedim(in_dims[0], 0)
    y = operator(x.flatten(0, 1), *matrix, features)
    return y.unflatten(0, (info.batch_size, -1)), 0


product = define(
    "apply(Tensor x, Tensor values, Tensor rows, Tensor columns, Tensor? bias, int features)"
    " -> Tensor",
    _compute,
    _fake,
    _Apply,
    batched,
)
"""``product(x, values, crow_indices, col_indices, bias, out_features)``: x·αᵀ + b of x [batch, in],
with values [stored] or [blocks, r, c], int32 indices and b [out] or None."""
