"""What surrounds a program changes nothing: defaults of torch, modes, kinds of tensors."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map

import topkast_func as tk
from tests.storage import STORAGES
from topkast_func.data import SyntheticDataset

CONFIG = tk.TopKastConfig(forward_sparsity=0.7, backward_sparsity=0.4, refresh_every=2)
AOT, EAGER = {"backend": "aot_eager"}, {"backend": "eager"}
every_storage = pytest.mark.parametrize("storage", STORAGES)
compiled_or_not = pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "compiled"])


def network(**where: Any) -> nn.Module:
    layers = (nn.Linear(6, 8, **where), nn.BatchNorm1d(8, **where), nn.Dropout(0.5))
    return nn.Sequential(*layers, nn.Linear(8, 3, **where))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    like: Any = {"dtype": torch.float32, "device": "cpu", "generator": generator}
    return torch.randn(16, 6, **like), torch.randn(16, 3, **like)


def mse(apply: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def trained(
    model: nn.Module, compile: Any = False, optimizer: Any = None, storage: Any = "compact"
) -> tuple[tk.TrainState, tk.StepMetrics]:
    optimizer = optimizer or tk.adam(0.01)
    state = tk.init_state(model, CONFIG, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=compile)
    for _ in range(5):
        state, metrics = train_step(state, batch())
    return state, metrics


def leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = tree_flatten(tree)[0]
    return found


def same(one: Any, other: Any) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# Default device and dtype.

FACTORIES = {function.__name__ for function in _device_constructors()} | {"Generator"}


def unplaced(source: str) -> Iterator[str]:
    """Yield the calls of factories of torch that do not say on which device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        made = ast.unparse(node.func)
        placed = {keyword.arg for keyword in node.keywords} & {"device", None}
        placed |= {"device"} if made == "torch.Generator" and node.args else set()
        if made in {f"torch.{name}" for name in FACTORIES} and not placed:
            yield ast.unparse(node)


@pytest.mark.parametrize("path", sorted(Path(tk.__file__).parent.rglob("*.py")), ids=str)
def test_every_factory_names_its_device(path: Path) -> None:
    assert not list(unplaced(path.read_text()))


def test_a_factory_without_a_device_is_seen() -> None:
    sources = ["torch.zeros(3)", "torch.Generator()", "x = torch.arange(3, dtype=torch.int64)"]
    assert [len(list(unplaced(source))) for source in sources] == [1, 1, 1]
    assert not list(unplaced("torch.zeros(3, device='cpu'); torch.zeros_like(x); x.new_zeros(3)"))


def whole_run(model: nn.Module, storage: Any, folder: Path) -> list[Any]:
    """Do with a model whatever makes tensors."""
    found: list[Any] = []
    methods = (tk.topkast(), tk.random_backward(), tk.static(), tk.set(), tk.rigl(), tk.dense())
    for method in methods:
        config = tk.TopKastConfig(0.7, 0.4, refresh_every=2, explore_until=5, method=method)
        optimizer = tk.sgd(lambda step: 0.1, momentum=0.9)
        state = tk.init_state(model, config, optimizer, storage=storage)
        train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
        for _ in range(6):
            state, metrics = train_step(state, batch())
        tk.save(state, folder / "state")
        state = tk.load(folder / "state", config, model, optimizer)
        theta, masks = tk.dense_params(state), tk.masks_of(state)
        penalty = tk.exploration_penalty(theta, masks, config)
        matrices = [matrix.to_dense() for matrix in tk.to_sparse(state).values()]
        found += [state, metrics, tk.forward_params(state), penalty, matrices]
    torch.manual_seed(0)
    layer = tk.TopKastLinear(6, 3, 0.7, 0.4, device="cpu", dtype=torch.float32)
    layer.update_active_param_set()
    loss = tk.TopKastLoss(nn.functional.mse_loss, nn.Sequential(layer))
    loss(layer(batch()[0]), batch()[1]).backward()
    found += [layer.weight, [p.grad for p in layer.parameters()]]
    found += [SyntheticDataset(8)[:], loss.compute_norm_active_set()]
    net = network(device="cpu", dtype=torch.float32)
    sparsifier = tk.sparsify(net, tk.TopKastConfig(0.7, 0.4, refresh_every=2))
    descent = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        (mse(net, batch()) + sparsifier.penalty()).backward()  # type: ignore[no-untyped-call]
        descent.step()
        sparsifier.step()
    return [*found, net.state_dict(), sparsifier.masks()]


@every_storage
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.float16)]
)
def test_default_device_and_dtype_change_nothing(
    device: str, dtype: torch.dtype, storage: str, tmp_path: Path
) -> None:
    model = network()
    expected = whole_run(model, storage, tmp_path)
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        found = whole_run(model, storage, tmp_path)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert same(found, expected)


# Inference mode.


@compiled_or_not
def test_a_state_made_and_stepped_in_inference_mode_is_an_ordinary_one(compile: Any) -> None:
    model = network()
    expected = trained(model)
    with torch.inference_mode():
        found = trained(model, compile)
        twin = network()
    assert same(found, expected)
    assert not any(leaf.is_inference() for leaf in leaves(found[0]))
    assert any(p.is_inference() for p in twin.parameters())
    assert int(trained(twin)[0].step) == 5


@compiled_or_not
def test_a_state_and_a_batch_from_inference_mode_train_on(compile: Any, tmp_path: Path) -> None:
    model, optimizer = network(), tk.adam(0.01)
    state, _ = trained(model, optimizer=optimizer)
    tk.save(state, tmp_path / "state")
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=compile)
    expected = train_step(state, batch())
    with torch.inference_mode():
        loaded = tk.load(tmp_path / "state", CONFIG, model, optimizer)
        cloned, inputs = tree_map(torch.clone, (state, batch()))
    assert all(leaf.is_inference() for leaf in leaves((cloned, inputs)))
    for start in (loaded, cloned):
        found = train_step(start, inputs)
        assert same(tk.dense_params(found[0]), tk.dense_params(expected[0]))
        assert same(found[1], expected[1])
        refreshed = tk.refresh(start, CONFIG)
        assert same(tk.masks_of(refreshed), tk.masks_of(tk.refresh(state, CONFIG)))
        assert not any(leaf.is_inference() for leaf in leaves(refreshed))


# What is handed out is the caller's.


@every_storage
def test_a_state_shares_nothing_with_what_it_hands_out(storage: str) -> None:
    model = network()
    model.get_parameter("3.bias").requires_grad_(False)
    state, _ = trained(model, storage=storage)
    before = tree_map(torch.clone, state)
    handed = [tk.forward_params(state), tk.dense_params(state), tk.masks_of(state)]
    memory = {leaf.untyped_storage().data_ptr() for leaf in leaves(state)}
    for leaf in leaves(handed):
        assert leaf.untyped_storage().data_ptr() not in memory
        leaf.zero_()
    assert same(state, before)


@every_storage
def test_batchnorm_in_training_mode_leaves_the_state_alone(storage: str) -> None:
    model = network()
    state, _ = trained(model, storage=storage)
    before = tree_map(torch.clone, state)
    functional_call(model, tk.forward_params(state), batch()[:1])
    twin = network()
    twin.load_state_dict(tk.forward_params(state), assign=True)
    nn.functional.mse_loss(twin(batch()[0]), batch()[1]).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(twin.parameters(), 0.1).step()
    assert same(state, before)


# Models that torch.compile has wrapped.


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def a_part_in_place(model: nn.Module) -> nn.Module:
    model.get_submodule("0").compile(backend="eager")
    return model


def wrapped(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "compile"),
    [
        *((wrap, False) for wrap in (wrapped, in_place, a_part_in_place)),
        *((wrapped, EAGER), (in_place, EAGER)),
    ],
)
def test_a_compiled_module_trains_like_the_module_in_it(
    wrap: Callable[[nn.Module], Any], compile: Any
) -> None:
    torch.compiler.reset()
    model = network()
    expected = trained(model)
    model = wrap(model)
    calls = [part._compiled_call_impl for part in model.modules()]
    assert same(trained(model, compile), expected)
    assert [part._compiled_call_impl for part in model.modules()] == calls
    theta, masks = tk.dense_params(expected[0]), tk.masks_of(expected[0])
    model.eval()
    gradient = torch.func.grad(lambda p: tk.penalized_loss(model, mse, p, masks, batch(), CONFIG))
    assert set(gradient(theta)) == set(theta)


def test_a_compiled_function_is_unwrapped() -> None:
    apply = torch.compile(lambda p, x: x @ p["weight"].T, backend="eager")
    loss = torch.compile(mse, backend="eager")
    optimizer = tk.sgd(0.1)
    state = tk.init_state({"weight": torch.randn(3, 6)}, CONFIG, optimizer)
    train_step = tk.make_train_step(apply, loss, CONFIG, optimizer, compile=False)
    assert int(train_step(state, batch())[0].step) == 1


def test_a_compiled_part_is_named() -> None:
    model: Any = network()
    model[3] = torch.compile(model[3])
    with pytest.raises(ValueError, match=r"the parts \['3'\] of the model are what torch.compile"):
        tk.make_train_step(model, mse, CONFIG, tk.sgd(0.1))


# Complex numbers are trained densely, as torch.optim does.


class Spectral(nn.Module):
    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))
        self.register_buffer("phase", torch.ones(4, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(self.lift(x)) * self.phase.to(self.weight.dtype)
        return torch.view_as_real(waves @ self.weight.T).sum(-1)


@pytest.mark.parametrize(
    ("storage", "compile"), [("compact", False), ("dense", False), ("compact", AOT)]
)
@pytest.mark.parametrize(
    ("own", "other"),
    [
        (tk.sgd(0.01, momentum=0.9), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)),
        (tk.adamw(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
    ],
)
def test_complex_parameters_train_as_in_torch(
    own: tk.Optimizer, other: Any, storage: Any, compile: Any
) -> None:
    model, twin = Spectral(), Spectral()
    twin.load_state_dict(model.state_dict())
    config = tk.TopKastConfig(0.0, 0.0, penalty=None, refresh_every=3)
    state = tk.init_state(model, config, own, storage=storage)
    train_step = tk.make_train_step(model, mse, config, own, compile=compile)
    optimizer = other(twin.parameters())
    for _ in range(8):
        state, _ = train_step(state, batch())
        optimizer.zero_grad()
        mse(twin, batch()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, p in twin.named_parameters():
        start = model.get_parameter(name).detach()
        moved = p.detach() - start
        assert moved.abs().min() > 0
        torch.testing.assert_close(tk.dense_params(state)[name] - start, moved)
    assert list(tk.masks_of(state)) == ["lift.weight"]


def test_complex_parameters_that_are_to_be_sparse_are_named() -> None:
    config = tk.TopKastConfig(0.7, 0.4, sparse="*weight")
    with pytest.raises(ValueError, match=r"selects \['weight'\], of complex numbers, .*keep_dense"):
        tk.init_state(Spectral(), config, tk.sgd(0.1))


# Kinds of tensors that are no plain ones.


class Named(Tensor):
    """A subclass that computes as tensors do."""


def test_parameters_of_a_subclass_train_as_plain_tensors() -> None:
    plain, model = network(), network()
    model.load_state_dict(plain.state_dict())
    weight = model.get_parameter("0.weight").detach().as_subclass(Named)
    model.get_submodule("0").weight = nn.Parameter(weight)
    assert isinstance(model.get_parameter("0.weight"), Named)
    found = trained(model, EAGER)
    assert {type(leaf) for leaf in leaves(found[0])} == {Tensor}
    assert same(found, trained(plain))


def test_a_batch_of_a_subclass_is_named_where_it_cannot_be_compiled() -> None:
    model, optimizer = nn.Linear(6, 3), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    named = tuple(tensor.as_subclass(Named) for tensor in batch())
    expected = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)(state, batch())
    found = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)(state, named)
    assert same(found[0], expected[0])
    with pytest.raises(TypeError, match=r"the batch holds a Named, .*as_subclass"):
        tk.make_train_step(model, mse, CONFIG, optimizer, compile=AOT)(state, named)


def two_tensors() -> Tensor:
    return TwoTensor(torch.ones(2, 2), torch.ones(2, 2))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), TypeError, r"\['weight'\] has layout torch.sparse_coo"),
        (
            lambda: torch.eye(3).to_sparse_csr(),
            TypeError,
            "has layout torch.sparse_csr: give dense",
        ),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), TypeError, "has layout nested"),
        (two_tensors, TypeError, "is a TwoTensor, which"),
        (lambda: torch.ones(3, 3, device="meta"), ValueError, "'weight' is on the meta device, wi"),
        (
            lambda: nn.UninitializedParameter(),
            ValueError,
            r"params\['weight'\] has no shape yet: run the mod",
        ),
        (
            lambda: torch.ones(3, 3, dtype=torch.int64),
            TypeError,
            "must have a floating-point dtype",
        ),
    ],
)
def test_what_cannot_be_trained_is_named(
    weight: Callable[[], Tensor], error: type[Exception], message: str
) -> None:
    params = {"weight": weight()}
    for use in (
        lambda: tk.compute_masks(params, CONFIG),
        lambda: tk.init_state(params, CONFIG, tk.sgd(0.1)),
    ):
        with pytest.raises(error, match=message):
            use()


def test_modules_without_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device.* to_empty"):
        tk.init_state(network(device="meta"), CONFIG, tk.sgd(0.1))
    with pytest.raises(ValueError, match=r"'weight'\]? has no shape yet"):
        tk.init_state(nn.LazyLinear(3), CONFIG, tk.sgd(0.1))
    model = network()
    model.register_buffer("table", torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="'table' is on the meta device"):
        tk.init_state(model, CONFIG, tk.sgd(0.1))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_sets_that_a_transform_would_choose_are_refused(transform: Any) -> None:
    def loss(weight: Tensor) -> Tensor:
        tk.compute_masks({"weight": weight, "bias": weight[0]}, CONFIG)
        return weight.sum()

    shape = (2, 4, 5) if transform is torch.func.vmap else (4, 5)
    with pytest.raises(ValueError, match=r"hide those of 'weight': call compute_masks outside"):
        transform(loss)(torch.randn(shape))


# Words.


@pytest.mark.parametrize("storage", STORAGES)
def test_dense_training_cannot_begin_at_a_refresh(storage: Any) -> None:
    state = tk.init_state(network(), CONFIG, tk.sgd(0.1), storage=storage)
    dense = tk.TopKastConfig(0.7, 0.4, method=tk.dense())
    with pytest.raises(ValueError, match=r"method=Dense\(\) chooses no sets, and .* init_state"):
        tk.refresh(state, dense)
    own = tk.TopKastConfig(0.7, 0.4, method=tk.Method())
    with pytest.raises(NotImplementedError, match="Method chooses no sets: override `sets`"):
        tk.refresh(state, own)


@torch._dynamo.config.patch(recompile_limit=1)  # type: ignore[untyped-decorator]
def test_numbers_that_change_are_to_be_tensors() -> None:
    model, optimizer = nn.Linear(6, 3), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    loss = lambda apply, batch: batch[1] * apply(batch[0]).square().mean()  # noqa: E731
    train_step = tk.make_train_step(model, loss, CONFIG, optimizer, compile={"backend": "eager"})

    def epoch(state: tk.TrainState) -> None:
        for number in range(4):
            state, _ = train_step(state, (batch()[0], number / 4))

    with pytest.raises(RuntimeError, match=r"numbers that change, .* passed as tensors"):
        epoch(state)


@pytest.mark.parametrize("reason", ["NaN", "compiler"])
def test_warnings_point_at_the_line_that_called(reason: str) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler")

    model, optimizer = nn.Linear(6, 3), tk.sgd(0.1)
    config = tk.TopKastConfig(0.7, 0.4, refresh_every=1)
    scale = float("nan") if reason == "NaN" else 1.0
    loss = lambda apply, batch: scale * mse(apply, batch)  # noqa: E731
    options = False if reason == "NaN" else {"backend": backend}
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, loss, config, optimizer, compile=options)
    with pytest.warns(UserWarning, match="no refresh|no compiler") as warned:
        tk.train(train_step, state, [batch()] * 2, config)
    assert [warning.filename for warning in warned] == [__file__]


def test_a_compiled_step_reads_a_batch_that_is_the_negative_of_what_is_in_memory() -> None:
    """Inductor reads an imaginary part of a conjugate without its sign."""
    model, optimizer, (inputs, targets) = network(), tk.sgd(0.1), batch()
    negative = torch.complex(torch.zeros_like(inputs), -inputs).conj().imag
    assert negative.is_neg()
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer)
    expected = train_step(state, (inputs, targets))
    assert same(train_step(state, (negative, targets)), expected)


class Kind(Tensor):
    """A kind of tensor that is computed as any."""


@every_storage
def test_what_a_step_returns_are_plain_tensors_whatever_the_batch_is(storage: Any) -> None:
    model, optimizer = network(), tk.adamw(0.01)
    state = tk.init_state(model, CONFIG, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    expected, found = state, state
    for _ in range(3):
        expected, _ = train_step(expected, batch())
        found, metrics = train_step(found, tree_map(lambda t: t.as_subclass(Kind), batch()))
        assert {*map(type, leaves((found, metrics)))} == {Tensor}
    assert same(found, expected)
