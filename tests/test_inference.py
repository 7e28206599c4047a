"""A sparse module computes what the model at α does, is smaller, and exports."""

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

import topkast_func as tk
from tests.inferred import layers, made, small
from topkast_func.inference import linear
from topkast_func.kernels import inference as kernels
from topkast_func.kernels.layouts import csr_matrix

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

BATCHES = [0, 1, 2, 3, 4, 5, 15, 16, 17, 64, 300]


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32, bias=False)).to(dtype)


@small
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (1, 16)])
def test_it_computes_what_the_model_at_alpha_does(
    batch: int, dtype: torch.dtype, block: tuple[int, int]
) -> None:
    sparse, plain, _ = made(perceptron(dtype), tk.TopKastConfig(0.9, block_shape=block))
    assert len(layers(sparse)) == 2
    x = torch.randn(batch, 48, dtype=dtype)
    with torch.no_grad():
        assert_close(sparse(x), plain(x))


@small
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_inputs_have_any_number_of_axes(sizes: list[int]) -> None:
    sparse, plain, _ = made(perceptron())
    x = torch.randn(*sizes, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(sparse(x), plain(x))
        assert_close(
            sparse(x.select(0, 0)) if sizes[0] else sparse(x),
            plain(x.select(0, 0)) if sizes[0] else plain(x),
        )


@small
def test_without_numba_torch_computes_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, plain, _ = made(perceptron())
    monkeypatch.setattr(kernels, "installed", lambda name: False)
    x = torch.randn(40, 48)
    with torch.no_grad():
        assert_close(sparse(x), plain(x))


@small
def test_the_tensors_are_those_of_csr_and_the_file_is_smaller_than_dense(tmp_path: Path) -> None:
    sparse, plain, state = made(perceptron(), tk.TopKastConfig(0.8))
    tensors = sparse.state_dict()
    assert [*tensors] == [
        "0.values", "0.bias", "0.crow_indices", "0.col_indices",
        "2.values", "2.crow_indices", "2.col_indices",
    ]  # fmt: skip
    parts = [tensors[f"0.{name}"] for name in ("crow_indices", "col_indices", "values")]
    weight = csr_matrix(parts[0], parts[1], parts[2], (64, 48), check=True).to_dense()
    assert torch.equal(weight, tk.forward_params(state)["0.weight"])
    assert torch.equal(layers(sparse)[0].weight, weight)
    assert len(tensors["0.values"]) == tk.masks_of(state)["0.weight"].forward.sum()
    save_file(tensors, tmp_path / "sparse")
    save_file(plain.state_dict(), tmp_path / "dense")
    assert (tmp_path / "sparse").stat().st_size < 0.6 * (tmp_path / "dense").stat().st_size
    other, *_ = made(perceptron().apply(_shuffled), tk.TopKastConfig(0.8))
    x = torch.randn(20, 48)
    with torch.no_grad():
        assert not torch.allclose(other(x), plain(x))
        other.load_state_dict(load_file(tmp_path / "sparse"))
        assert_close(other(x), plain(x))


def _shuffled(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data = module.weight.data.flip(0)


@small
@pytest.mark.parametrize("batch", [1, 40])
def test_compiled_equals_eager(batch: int) -> None:
    sparse, _, _ = made(perceptron())
    fast = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = torch.randn(batch, 48)
    with torch.no_grad():
        assert torch.equal(fast(x), sparse(x))


@small
def test_it_exports_for_any_batch() -> None:
    sparse, plain, _ = made(perceptron())
    rows = {0: torch.export.Dim("batch", min=1, max=4096)}
    program = torch.export.export(sparse, (torch.randn(8, 48),), dynamic_shapes=(rows,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 2, 16, 100):
        x = torch.randn(batch, 48)
        assert_close(loaded(x), plain(x))


@small
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_can_be_copied_and_converted(copied: Any) -> None:
    sparse, plain, _ = made(perceptron())
    x = torch.randn(20, 48)
    with torch.no_grad():
        assert_close(copied(sparse)(x), plain(x))
        for dtype in (torch.float64, torch.bfloat16):
            found, expected = (copied(m).to(dtype)(x.to(dtype)) for m in (sparse, plain))
            assert_close(found, expected)


@small
def test_an_input_that_requires_a_gradient_gets_that_of_the_model() -> None:
    sparse, plain, _ = made(perceptron())
    x = torch.randn(20, 48)
    grads = []
    for function in (plain, sparse, torch.compile(sparse, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0] is not None
    assert grads[0].count_nonzero()
    assert_close(grads[1], grads[0])
    assert_close(grads[2], grads[0])
    assert not any(p.requires_grad for p in sparse.parameters())
    found = torch.func.grad(lambda leaf: sparse(leaf).square().sum())(x)
    assert_close(found, grads[0])


def jacobian_forwards(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.jacfwd(layer)(x)


def jacobian_backwards(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.jacrev(layer)(x)


def dual_tangent(layer: nn.Module, x: Tensor) -> Any:
    forward_ad: Any = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent


def curvature(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.hessian(lambda x: layer(x).pow(3).sum())(x)


@small
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("derive", [jacobian_forwards, jacobian_backwards, dual_tangent, curvature])
def test_derivatives_of_any_mode_and_order(derive: Any, block: tuple[int, int]) -> None:
    sparse, plain, _ = made(perceptron(torch.float64), tk.TopKastConfig(0.9, block_shape=block))
    for batch in (2, 20):
        x = torch.randn(batch, 48, dtype=torch.float64)[: 1 if derive is curvature else batch]
        expected = derive(plain, x)
        assert expected.count_nonzero()
        assert_close(derive(sparse, x), expected)


@small
def test_a_compiled_derivative_is_that_of_the_eager_layer() -> None:
    sparse, plain, _ = made(perceptron())
    x, way = torch.randn(2, 20, 48).unbind(0)

    def along(x: Tensor) -> Tensor:
        moved: Tensor = torch.func.jvp(sparse, (x,), (way,))[1]
        return moved

    expected = torch.func.jvp(plain, (x,), (way,))[1]
    assert expected.count_nonzero()
    assert_close(torch.compile(along, backend="aot_eager", fullgraph=True)(x), expected)


@small
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_values_and_bias_that_require_a_gradient_get_it(block: tuple[int, int]) -> None:
    sparse, _, _ = made(perceptron(torch.float64), tk.TopKastConfig(0.9, block_shape=block))
    layer = layers(sparse)[0]
    assert layer.bias is not None
    given = layer.values.clone().requires_grad_(), layer.bias.clone().requires_grad_()

    def run(values: Tensor, bias: Tensor) -> Any:
        return functional_call(layer, {"values": values, "bias": bias}, (x,))

    for batch in (2, 20):
        x = torch.randn(batch, 48, dtype=torch.float64)
        assert torch.autograd.gradcheck(run, given, check_forward_ad=True)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Leave to others as many graphs of a layer as Dynamo keeps."""
    yield
    torch.compiler.reset()


@small
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("batch", [4, 5, 16])
def test_it_compiles_with_inductor_whatever_computes_a_batch(batch: int) -> None:
    sparse, plain, _ = made(perceptron())
    x = torch.randn(batch, 48)
    with torch.no_grad():
        found = torch.compile(sparse, dynamic=False)(x)
        assert_close(found, plain(x))
        assert found.stride() == plain(x).stride() == sparse(x).stride()


@small
@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), TypeError, "bias is torch.float64, the weight is"),
        (torch.zeros(4).long(), TypeError, "bias is torch.int64, the weight is"),
        (torch.zeros(3), ValueError, r"bias must be of shape \(4,\), got \(3,\)"),
        (torch.zeros(1, 4), ValueError, r"bias must be of shape \(4,\), got \(1, 4\)"),
        ([0.0] * 4, TypeError, "bias must be a Tensor"),
    ],
    ids=str,
)
def test_a_bias_that_does_not_fit_is_named_at_the_start_and_later(
    bias: Any, error: Any, message: str
) -> None:
    weight = torch.eye(4).to_sparse_csr()
    with pytest.raises(error, match=message):
        tk.SparseLinear(weight, bias)
    layer = tk.SparseLinear(weight, torch.zeros(4))
    if isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias, requires_grad=False)
        for batch in (1, 8, 64):
            with pytest.raises(error, match=message):
                layer(torch.ones(batch, 4))


@small
@pytest.mark.parametrize(
    "names", [["col_indices"], ["crow_indices"], ["crow_indices", "col_indices"]]
)
def test_indices_of_another_dtype_are_named(names: list[str]) -> None:
    layer = tk.SparseLinear(torch.eye(4).to_sparse_csr())
    layer.load_state_dict({n: getattr(layer, n).long() for n in names}, strict=False, assign=True)
    for batch in (1, 4, 8, 64):
        with pytest.raises(TypeError, match="crow_indices and col_indices must be int32, got"):
            layer(torch.ones(batch, 4))


@pytest.mark.parametrize("batch", [3, 10, 64])
@pytest.mark.parametrize("assign", [True, False])
def test_indices_are_looked_at_in_inference_mode_too(batch: int, assign: bool) -> None:
    weight, x = torch.randn(32, 32) * (torch.rand(32, 32) < 0.2), torch.randn(batch, 32)
    with torch.inference_mode():
        layer = tk.SparseLinear(weight.to_sparse_csr())
        assert_close(layer(x), x @ weight.T)
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(state, assign=assign)
        assert_close(layer(x), x @ weight.T)
        state["col_indices"] += 1000
        layer.load_state_dict(state, assign=assign)
        with pytest.raises(RuntimeError, match="col_indices"):
            layer(x)
        layer.col_indices.copy_(layer.col_indices - 1000)
        assert_close(layer(x), x @ weight.T)
        layer.col_indices.add_(10**9)
        with pytest.raises(RuntimeError, match="col_indices"):
            layer(x)


@pytest.mark.parametrize("members", [1, 3, 4])
@pytest.mark.parametrize("batch", [1, 8, 20])
@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 0, None), (0, None, 0), (1, None, None)], ids=str)
def test_values_are_mapped_as_one_by_one(
    members: int, batch: int, dims: tuple[int, int | None, int | None]
) -> None:
    layer = tk.SparseLinear(torch.eye(4).to_sparse_csr(), torch.zeros(4))
    drawn = (torch.randn(members, *shape) for shape in ((4,), (batch, 4), (4,)))
    given = [t[0] if d is None else t.movedim(0, d) for t, d in zip(drawn, dims, strict=True)]

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Any:
        return functional_call(layer, {"values": values, "bias": bias}, (x,))

    singles = [
        run(*(t if d is None else t.select(d, i) for t, d in zip(given, dims, strict=True)))
        for i in range(members)
    ]
    assert_close(torch.vmap(run, dims)(*given), torch.stack(singles))


@small
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inputs_of_another_kind_are_named() -> None:
    layer = tk.SparseLinear(torch.eye(4).to_sparse_csr())
    nested = torch.nested.nested_tensor([torch.ones(1, 4), torch.ones(2, 4)])
    for wrong in ([1.0] * 4, torch.ones(2, 4).numpy(), torch.ones(2, 4).to_sparse(), nested):
        with pytest.raises(TypeError, match="inputs"):
            layer(wrong)
    assert layer.to("meta")(torch.ones(2, 4, device="meta")).shape == (2, 4)


@small
@pytest.mark.parametrize(("shape", "batch"), [((0, 4), 3), ((4, 0), 3), ((0, 0), 64), ((4, 6), 0)])
def test_layers_and_batches_without_entries(shape: tuple[int, int], batch: int) -> None:
    layer = tk.SparseLinear(torch.zeros(shape).to_sparse_csr(), torch.ones(shape[0]))
    assert "density=0.0%" in repr(layer)
    assert torch.equal(layer(torch.ones(batch, shape[1])), torch.ones(batch, shape[0]))


@small
def test_vmap_and_autocast() -> None:
    sparse, plain, _ = made(perceptron())
    x = torch.randn(3, 7, 48)
    with torch.no_grad():
        assert_close(torch.vmap(sparse, in_dims=1)(x), plain(x.transpose(0, 1)))
    for rows in (1, 5, 21):
        leaf = torch.randn(rows, 48, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = sparse(leaf), plain(leaf)
        assert y.dtype == torch.bfloat16
        assert_close(y, expected, rtol=0.05, atol=0.05)
        (gradient,) = torch.autograd.grad(y.float().sum(), leaf)
        (of_plain,) = torch.autograd.grad(expected.float().sum(), leaf)
        assert_close(gradient, of_plain, rtol=0.05, atol=0.05)


class Encoder(nn.Module):
    """Layers that read the weights of their parts, a tied weight, a convolution, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.shared = nn.Linear(64, 64)
        self.again = self.shared
        self.head = nn.Linear(64, 40)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.norm(self.mix(self.layers(self.words(words))))
        out: Tensor = self.head(self.again(self.shared(hidden)))
        return out


@small
def test_all_else_of_a_model_stays_and_the_model_itself_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = Encoder()
    model(torch.randint(0, 40, (5, 6)))
    before = copy.deepcopy(model.state_dict())
    sparse, plain, state = made(model)
    names = {name for name, part in sparse.named_modules() if isinstance(part, tk.SparseLinear)}
    parts = ["linear1", "linear2", *(f"self_attn.{key}_proj" for key in ("q", "k", "v", "out"))]
    linears = {f"layers.layers.{i}.{part}" for i in (0, 1) for part in parts}
    assert names == linears | {"shared", "head"}
    assert sparse.shared is sparse.again
    assert sparse.words.values is sparse.head.values
    assert not sparse.training
    words = torch.randint(0, 40, (3, 6))
    with torch.no_grad():
        assert_close(sparse(words), plain(words))
        product = Mock(wraps=kernels.product)
        monkeypatch.setattr(linear, "product", product)
        sparse(words)
    assert product.call_count == 2 * 6 + 2 + 1
    assert_close(functional_call(plain, tk.forward_params(state), words), plain(words))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


class Versioned(nn.Module):
    """A model that reads older files otherwise, and strips a prefix from their names."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 8))
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x) * self.gain
        return found

    def _load_from_state_dict(self, state: Any, prefix: str, about: Any, *others: Any) -> None:
        if about.get("version", 1) < 2 and f"{prefix}gain" in state:
            state[f"{prefix}gain"] = state[f"{prefix}gain"] * 2
        super()._load_from_state_dict(state, prefix, about, *others)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        stripped = {n[7:]: t for n, t in state_dict.items() if n.startswith("module.")}
        return super().load_state_dict(stripped, strict, assign)


@small
def test_how_a_model_loads_files_does_not_matter() -> None:
    model, x = Versioned(), torch.randn(3, 48)
    state = tk.init_state(Versioned(), tk.TopKastConfig(0.9), tk.sgd(0.1))
    sparse = tk.sparse_module(state, model, 64)
    with torch.no_grad():
        assert_close(sparse(x), functional_call(model, tk.forward_params(state), x))


@small
def test_it_shares_no_memory_with_the_state_or_the_model() -> None:
    model = perceptron()
    sparse, _, state = made(model, tk.TopKastConfig(0.9, keep_dense="2.*"))
    held = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(state)}
    held |= {p.untyped_storage().data_ptr() for p in model.parameters()}
    own = {t.untyped_storage().data_ptr() for t in sparse.state_dict().values()}
    assert not own & held


def test_a_layer_that_would_be_slower_or_larger_stays_dense() -> None:
    large, little = (nn.Sequential(nn.Linear(n, n)) for n in (512, 32))
    assert len(layers(made(large)[0])) == 1
    assert layers(made(large, tk.TopKastConfig(0.3))[0]) == []
    assert layers(made(large.bfloat16())[0]) == []
    assert layers(made(little)[0]) == []


@pytest.mark.parametrize(
    ("density", "batch", "threads", "expected"),
    [
        (0.1, 1, 1, True),
        (0.2, 1, 1, False),  # a dense one is as fast from the cache
        (0.2, 1, 2, True),
        (0.2, 2, 1, True),
        (0.2, 8, 1, True),
        (0.4, 8, 1, False),
        (0.2, 256, 1, True),
        (0.51, 256, 1, False),
        (0.51, 2, 4, False),  # as fast, but larger
    ],
)
def test_the_cost_model_knows_sizes_batches_and_threads(
    density: float, batch: int, threads: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    shape, stored = (1024, 1024), int(density * 1024**2)
    assert kernels.pays(shape, stored, batch, torch.float32, "cpu") is expected
    assert not kernels.pays(shape, stored, batch, torch.float32, "cuda")
    assert not kernels.pays(shape, stored, batch, torch.float16, "cpu")


@small
@pytest.mark.parametrize("storage", ["compact", "dense"])
@pytest.mark.parametrize("powerprop", [1.0, 2.0])
def test_either_storage_and_powerprop_give_alpha(storage: Any, powerprop: float) -> None:
    config = tk.TopKastConfig(0.9, powerprop=powerprop)
    sparse, plain, _ = made(perceptron(), config, storage=storage)
    assert len(layers(sparse)) == 2
    x = torch.randn(20, 48)
    with torch.no_grad():
        assert_close(sparse(x), plain(x))


@small
def test_a_model_that_is_one_layer_is_replaced_itself() -> None:
    model = nn.Linear(64, 64)
    assert isinstance(made(model)[0], tk.SparseLinear)


@small
@pytest.mark.parametrize(
    ("key", "value"), [("col_indices", 48), ("col_indices", -1), ("crow_indices", 10**6)]
)
@pytest.mark.parametrize("batch", [1, 20])
def test_indices_that_point_beyond_the_matrix_are_refused(key: str, value: int, batch: int) -> None:
    sparse, *_ = made(perceptron())
    x = torch.randn(batch, 48)
    sparse(x)
    tensors = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    tensors[f"0.{key}"][-1] = value
    sparse.load_state_dict(tensors)
    with pytest.raises(RuntimeError, match="`"):
        sparse(x)


@small
def test_bad_arguments_and_inputs_are_refused() -> None:
    model = perceptron()
    sparse, _, state = made(model)
    with pytest.raises(ValueError, match="of another model"):
        tk.sparse_module(state, nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, .* got function"):
        tk.sparse_module(state, lambda params, x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tk.sparse_module(state, model, 0)
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit a layer of in_features=48"):
        sparse(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"inputs are torch\.float64, the weight is torch\.float32"):
        sparse(torch.randn(2, 48, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"that of the state .* got TrainState"):
        tk.sparse_module(state)
    with pytest.raises(TypeError, match="state must be a TrainState, got Sequential"):
        tk.sparse_module(model, model)


@small
@pytest.mark.parametrize("plain", [False, True])
def test_the_model_of_an_ordinary_loop_needs_no_state(plain: bool) -> None:
    model, x = perceptron(), torch.randn(20, 48)
    sparsifier = tk.sparsify(model, tk.TopKastConfig(0.9))
    active = [int(masks.forward.sum()) for masks in sparsifier.masks().values()]
    with torch.no_grad():
        expected = model(x)
        if plain:
            tk.densify(model)
        before = copy.deepcopy(model.state_dict())
        sparse = tk.sparse_module(model)
        assert_close(sparse(x), expected)
        assert_close(model(x), expected)
    assert [len(layer.values) for layer in layers(sparse)] == active
    assert {type(part) for part in sparse} == {tk.SparseLinear, nn.ReLU}  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@small
def test_values_that_do_not_go_with_the_indices_are_refused() -> None:
    layer = tk.SparseLinear(torch.eye(6).to_sparse_csr())
    layer.values = nn.Parameter(layer.values[:3].clone())
    with pytest.raises(ValueError, match="3 values do not go with 6 col_indices"):
        layer(torch.ones(2, 6))


@small
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_buffers_of_half_complex_numbers_are_those_of_the_state() -> None:
    model = perceptron()
    model.register_buffer("phase", torch.ones(3, dtype=torch.complex32))
    sparse, _, _ = made(model)
    assert torch.equal(
        sparse.get_buffer("phase").to(torch.complex64), torch.ones(3, dtype=torch.complex64)
    )


class Keeping(nn.Sequential):
    """Keeps an activation, in a list too."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self[0](x)]
        self.last = self.kept[0].relu()
        y: Tensor = self[2](self.last)
        return y


def _pruned(model: nn.Module) -> nn.Module:
    prune: Any = torch.nn.utils.prune
    prune.l1_unstructured(model.get_submodule("0"), "weight", 0.5)
    return model


@pytest.mark.parametrize(
    "kept", [lambda model: model, _pruned, lambda model: nn.utils.weight_norm(model[0]) and model]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_modules_that_keep_what_a_pass_has_computed(kept: Any) -> None:
    model, x = kept(Keeping(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))), torch.randn(8, 16)
    config, optimizer = tk.TopKastConfig(0.8, sparse="2.weight"), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), config, optimizer, compile=False
    )
    state, _ = train_step(state, x)
    right = functional_call(model, tk.forward_params(state), x)
    assert_close(tk.sparse_module(state, model)(x), right)
    tk.sparsify(model, config)
    y = model(x)
    y.mean().backward()
    assert_close(tk.sparse_module(model)(x), y)
