"""The forward weights α as sparse matrices of other libraries."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from topkast_func.checks import check_block_shape
from topkast_func.kernels.layouts import csr_matrix
from topkast_func.training.readout import alpha_in, masks_of
from topkast_func.training.state import TrainState, check_one


def to_sparse(
    state: TrainState, layout: str = "csr", block_shape: tuple[int, int] = (1, 1)
) -> dict[str, Any]:
    """Return α of every sparse matrix, its stored entries being those of A.

    Args:
        state: The state.
        layout: "csr", "bsr" or "coo" for torch's own layouts, "scipy" for
            `scipy.sparse.csr_array` (16-bit numbers as float32), "torch_sparse" for
            `torch_sparse.SparseTensor`.
        block_shape: (r, c) of the blocks of "bsr", such as ``config.block_shape``. Blocks
            with an entry in A are stored whole.

    Returns:
        Matrices [out, in] by name, zeros in A stored too. Sparse parameters of fewer or more than
        two dimensions are left out.

    Raises:
        TypeError: ``state`` is no state, or ``block_shape`` no pair of integers.
        ValueError: The layout is unknown, or the blocks do not divide a matrix.

    Example:
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> config = TopKastConfig(forward_sparsity=0.75, backward_sparsity=0.5)
        >>> params = {"weight": torch.tensor([[3.0, -1.0], [-2.0, 2.0]])}
        >>> to_sparse(init_state(params, config, sgd(lr=0.1)), "coo")["weight"].indices().tolist()
        [[0], [0]]
    """
    if layout not in (*LAYOUTS, "bsr"):
        raise ValueError(f"layout must be one of {(*LAYOUTS, 'bsr')}, got {layout!r}")
    check_one(state)
    alpha = alpha_in(state)
    to_layout = partial(bsr, block_shape) if layout == "bsr" else LAYOUTS[layout]
    return {
        name: to_layout(alpha[name], masks.forward)
        for name, masks in masks_of(state).items()
        if alpha[name].ndim == 2
    }


def _coo(alpha: Tensor, mask: Tensor) -> Tensor:
    indices = mask.nonzero().T
    return torch.sparse_coo_tensor(
        indices,
        alpha[mask],
        alpha.shape,
        device=alpha.device,
        is_coalesced=True,
        check_invariants=True,
    )


def csr(alpha: Tensor, mask: Tensor) -> Tensor:
    """Return the entries of a matrix that a mask marks, of layout CSR."""
    pointers = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return csr_matrix(pointers, mask.nonzero()[:, 1], alpha[mask], (*alpha.shape,), check=True)


def bsr(block: tuple[int, int], alpha: Tensor, mask: Tensor) -> Tensor:
    """Return the blocks of a matrix that have an entry which a mask marks, of layout BSR.

    Args:
        block: (r, c) of a block.
        alpha: The matrix.
        mask: The mask, bool, of its shape.

    Returns:
        The blocks, whole.

    Raises:
        TypeError: ``block`` is no pair of integers.
        ValueError: The blocks do not divide the matrix.
    """
    rows, columns = alpha.shape
    height, width = check_block_shape("block_shape", block)
    if rows % height or columns % width:
        raise ValueError(f"blocks of {block} do not divide a matrix of shape {tuple(alpha.shape)}")

    def blocks(matrix: Tensor) -> Tensor:
        return matrix.view(rows // height, height, columns // width, width).transpose(1, 2)

    stored = blocks(mask).any(3).any(2)
    pointers = torch.nn.functional.pad(stored.sum(1).cumsum(0), (1, 0))
    found = blocks(alpha)[stored]
    return csr_matrix(pointers, stored.nonzero()[:, 1], found, (*alpha.shape,), check=True)


def _scipy(alpha: Tensor, mask: Tensor) -> Any:
    matrix = csr(alpha, mask).cpu()
    values = matrix.values()
    if values.dtype.itemsize < 4:
        values = values.float()
    parts = (values.numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy())
    return _optional("scipy.sparse").csr_array(parts, shape=tuple(alpha.shape))


def _torch_sparse(alpha: Tensor, mask: Tensor) -> Any:
    row, col = mask.nonzero().T
    return _optional("torch_sparse").SparseTensor(
        row=row, col=col, value=alpha[mask], sparse_sizes=tuple(alpha.shape), is_sorted=True
    )


def _optional(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as reason:
        raise ImportError(
            f"this layout needs {module}: install torch first, then "
            "pip install --no-build-isolation 'topkast_func[torch-sparse]'"
        ) from reason


LAYOUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "csr": csr,
    "coo": _coo,
    "scipy": _scipy,
    "torch_sparse": _torch_sparse,
}
