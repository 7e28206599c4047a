"""α as sparse matrices of torch, SciPy and torch_sparse."""

import re
import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import topkast_func as tk
from topkast_func.report import export

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script. is deprecated:DeprecationWarning"),
]

CONFIG = tk.TopKastConfig(forward_sparsity=0.75, backward_sparsity=0.5, sparse="*weight")
DENSE: dict[str, Callable[[Any], Tensor]] = {
    "csr": lambda matrix: matrix.to_dense(),
    "coo": lambda matrix: matrix.to_dense(),
    "scipy": lambda matrix: torch.from_numpy(matrix.toarray()),
    "torch_sparse": lambda matrix: matrix.to_dense(),
}
STORED: dict[str, Callable[[Any], int]] = {
    "csr": lambda matrix: matrix.values().numel(),
    "coo": lambda matrix: matrix.values().numel(),
    "scipy": lambda matrix: matrix.nnz,
    "torch_sparse": lambda matrix: matrix.nnz(),
}


def _state(theta: dict[str, Tensor]) -> tk.TrainState:
    return tk.init_state(theta, CONFIG, tk.sgd(lr=0.1))


def _matrices() -> dict[str, Tensor]:
    """Weights of several shapes; in the last, row 1 has no entry in A."""
    uneven = torch.tensor([[5.0, 4.0, 3.0], [0.1, 0.2, 0.3], [0.4, 2.0, 0.5], [0.6, 0.7, 0.8]])
    return {
        "square.weight": torch.randn(6, 6),
        "tall.weight": torch.randn(9, 1).double(),
        "wide.weight": torch.randn(1, 9),
        "uneven.weight": uneven,
    }


def test_every_layout_is_tested() -> None:
    assert export.LAYOUTS.keys() == DENSE.keys() == STORED.keys()


@pytest.mark.parametrize("layout", DENSE)
def test_the_dense_form_is_alpha(layout: str) -> None:
    state = _state({**_matrices(), "bias": torch.randn(6)})
    alpha = tk.forward_params(state)
    matrices = tk.to_sparse(state, layout)
    assert list(matrices) == [name for name in alpha if name != "bias"]
    for name, matrix in matrices.items():
        dense = DENSE[layout](matrix)
        assert dense.dtype == alpha[name].dtype
        assert torch.equal(dense, alpha[name])
        assert dense.count_nonzero() == STORED[layout](matrix) > 0


@pytest.mark.parametrize("layout", DENSE)
def test_zeros_in_the_forward_set_stay_stored(layout: str) -> None:
    theta = torch.zeros(4, 4)
    theta[2, 1] = 3.0
    state = _state({"weight": theta})
    matrix = tk.to_sparse(state, layout)["weight"]
    assert STORED[layout](matrix) == 4
    assert torch.equal(DENSE[layout](matrix), theta)


def test_the_stored_positions_are_those_of_the_forward_set() -> None:
    state = _state({"weight": torch.randn(5, 8)})
    positions = tk.masks_of(state)["weight"].forward.nonzero()
    row, col, _ = tk.to_sparse(state, "torch_sparse")["weight"].coo()
    rows, columns = tk.to_sparse(state, "scipy")["weight"].nonzero()
    csr = tk.to_sparse(state, "csr")["weight"]
    assert torch.equal(tk.to_sparse(state, "coo")["weight"].indices().T, positions)
    assert torch.equal(torch.stack((row, col), 1), positions)
    assert torch.equal(torch.from_numpy(rows), positions[:, 0])
    assert torch.equal(torch.from_numpy(columns), positions[:, 1])
    assert torch.equal(csr.col_indices(), positions[:, 1])
    assert torch.equal(csr.crow_indices().diff(), positions[:, 0].bincount(minlength=5))


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_exported(layout: str, dtype: torch.dtype) -> None:
    """SciPy cannot compute with them: its matrix holds the same values in float32."""
    state = _state({"weight": torch.randn(6, 6).to(dtype)})
    dense = DENSE[layout](tk.to_sparse(state, layout)["weight"])
    assert torch.equal(dense.float(), tk.forward_params(state)["weight"].float())


def test_csr_is_the_default_layout() -> None:
    assert tk.to_sparse(_state(_matrices()))["square.weight"].layout == torch.sparse_csr


@pytest.mark.parametrize("layout", DENSE)
def test_weights_that_are_no_matrices_are_left_out(layout: str) -> None:
    shapes = {"conv": (4, 3, 3, 3), "linear": (4, 4), "norm": (4,), "scale": ()}
    state = _state({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()})
    assert len(tk.masks_of(state)) == len(shapes)
    assert tk.to_sparse(state, layout).keys() == {"linear.weight"}


@pytest.mark.parametrize("layout", DENSE)
def test_a_matrix_shares_no_memory_with_the_state(layout: str) -> None:
    state = _state(_matrices())
    matrix = tk.to_sparse(state, layout)["square.weight"]
    before = DENSE[layout](matrix).clone()
    tk.dense_params(state)["square.weight"].fill_(7.0)
    assert torch.equal(DENSE[layout](matrix), before)


def test_torch_sparse_multiplies_as_the_sparse_forward_of_a_linear_layer() -> None:
    layer = nn.Linear(20, 12, bias=False, dtype=torch.float64)
    state = tk.init_state(layer, CONFIG, tk.sgd(lr=0.1))
    matrix = tk.to_sparse(state, "torch_sparse")["weight"]
    x = torch.randn(7, 20, dtype=torch.float64)
    upstream = torch.randn(7, 12, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = tk.sparse_forward(layer, tk.dense_params(state), tk.masks_of(state), ours)
    found = import_module("torch_sparse").matmul(matrix, theirs.T).T
    assert_close(found, expected)
    expected.backward(upstream)
    found.backward(upstream)
    assert ours.grad is not None
    assert ours.grad.count_nonzero() > 0
    assert_close(theirs.grad, ours.grad)


def test_scipy_and_torch_multiply_as_alpha_does() -> None:
    state, x = _state(_matrices()), torch.randn(6, 3)
    expected = tk.forward_params(state)["square.weight"] @ x
    assert_close(tk.to_sparse(state, "csr")["square.weight"] @ x, expected)
    assert_close(tk.to_sparse(state, "coo")["square.weight"] @ x, expected)
    product = tk.to_sparse(state, "scipy")["square.weight"] @ x.numpy()
    assert_close(torch.from_numpy(product), expected)


@pytest.mark.parametrize(
    ("layout", "module"), [("scipy", "scipy.sparse"), ("torch_sparse", "torch_sparse")]
)
def test_a_missing_library_is_named_with_the_way_to_install_it(
    layout: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = f"this layout needs {module}: .*pip install .*topkast_func\\[torch-sparse\\]"
    with pytest.raises(ImportError, match=message):
        tk.to_sparse(_state(_matrices()), layout)


def test_torch_layouts_need_no_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("scipy", "scipy.sparse", "torch_sparse"):
        monkeypatch.setitem(sys.modules, module, None)
    fresh = runpy.run_path(export.__file__)
    for layout in ("csr", "coo"):
        assert fresh["to_sparse"](_state(_matrices()), layout)


@pytest.mark.parametrize("layout", ["", "CSR", "csc", None])
def test_an_unknown_layout_is_refused(layout: Any) -> None:
    message = (
        f"layout must be one of ('csr', 'coo', 'scipy', 'torch_sparse', 'bsr'), got {layout!r}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tk.to_sparse(_state(_matrices()), layout)


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (4, 1)])
def test_bsr_stores_whole_blocks_and_comes_back(block: tuple[int, int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 4))
    config = tk.TopKastConfig(block_shape=block)
    state = tk.init_state(model, config, tk.sgd(0.1))
    alpha, masks = tk.forward_params(state), tk.masks_of(state)
    matrices = tk.to_sparse(state, "bsr", block)
    assert set(matrices) == {"0.weight", "1.weight"}
    for name, matrix in matrices.items():
        assert matrix.layout == torch.sparse_bsr
        assert matrix.values().shape[1:] == block
        assert matrix.values().numel() == int(masks[name].forward.sum())
        assert torch.equal(matrix.to_dense(), alpha[name])


def test_bsr_stores_a_block_whole_that_has_one_entry_of_a() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 1], weight[3, 0], weight[3, 1] = 3.0, 2.0, 1.0
    state = tk.init_state({"weight": weight}, tk.TopKastConfig(1 - 3 / 16, sparse="*"), tk.sgd(0.1))
    matrix = tk.to_sparse(state, "bsr", (2, 2))["weight"]
    assert matrix.values().shape == (2, 2, 2)
    assert torch.equal(matrix.to_dense(), weight)


def test_blocks_that_do_not_divide_a_matrix_are_refused() -> None:
    state = tk.init_state(torch.nn.Linear(3, 4), tk.TopKastConfig(), tk.sgd(0.1))
    with pytest.raises(ValueError, match=r"blocks of \(2, 2\) do not divide .* \(4, 3\)"):
        tk.to_sparse(state, "bsr", (2, 2))


def test_blocks_have_at_least_one_entry() -> None:
    with pytest.raises(ValueError, match="block_shape must be at least 1, got 0"):
        tk.to_sparse(_state({"weight": torch.randn(6, 6)}), "bsr", (0, 1))
