"""Compact storage: the trajectory of dense storage, from the values of B alone."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_flatten
from transformers.pytorch_utils import Conv1D

import topkast_func as tk
from topkast_func.storage.compact import CompactWeights

CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=2, penalty_weight=0.05)
STEPS = 9
"""Four refreshes."""

TIGHT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-11}
"""Sums in another order in float64, carried through nine steps."""

OPTIMIZERS: dict[str, Callable[[], tk.Optimizer]] = {
    "momentum": lambda: tk.sgd(0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda: tk.adam(0.02),
    "adamw": lambda: tk.adamw(0.02, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def mse(apply: Any, batch: Batch) -> Tensor:
    y = apply(batch[0])
    return nn.functional.mse_loss(y[0] if isinstance(y, tuple) else y, batch[1])


def batches_of(x: tuple[int, ...], y: tuple[int, ...], n: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    double = torch.float64
    return [
        (
            torch.randn(x, generator=generator, dtype=double),
            torch.randn(y, generator=generator, dtype=double),
        )
        for _ in range(n)
    ]


BATCHES = batches_of((12, 8), (12, 4))


def trajectory(
    model: nn.Module,
    storage: Any,
    make: Callable[[], tk.Optimizer],
    config: tk.TopKastConfig = CONFIG,
    batches: list[Batch] = BATCHES,
    loss: Any = mse,
    compile: Any = False,
    engine: Any = "auto",
    **options: Any,
) -> list[tk.TrainState]:
    optimizer = make()
    state = tk.init_state(model, config, optimizer, storage=storage, **options)
    step = tk.make_train_step(model, loss, config, optimizer, compile=compile, engine=engine)
    states = [state]
    for batch in batches:
        state, _ = step(state, batch)
        states.append(state)
    return states


def assert_agree(compact: list[tk.TrainState], dense: list[tk.TrainState]) -> None:
    """Compare every update, and the sets after every step."""
    start = tk.dense_params(dense[0])
    for one, other in zip(compact[1:], dense[1:], strict=True):
        found, expected = tk.dense_params(one), tk.dense_params(other)
        assert found.keys() == expected.keys()
        for name in expected:
            update = expected[name] - start[name]
            assert update.any()
            torch.testing.assert_close(found[name] - start[name], update, **TIGHT)
        for name, masks in tk.masks_of(other).items():
            assert all(map(torch.equal, tk.masks_of(one)[name], masks))
        torch.testing.assert_close(one.buffers, other.buffers, **TIGHT)
        torch.testing.assert_close(tk.forward_params(one), tk.forward_params(other), **TIGHT)
    for name, first in tk.masks_of(dense[0]).items():
        exploring = first.backward & ~first.forward
        moved = tk.dense_params(dense[1])[name] != start[name]
        assert moved[exploring].any() or not exploring.any()
    assert any(
        not torch.equal(tk.masks_of(dense[0])[name].backward, masks.backward)
        for name, masks in tk.masks_of(dense[-1]).items()
    )


def check(model: nn.Module, **options: Any) -> list[tk.TrainState]:
    """Train copies of a module in both storages, the dense one eager, and compare."""
    make = options.pop("make", OPTIMIZERS["adam"])
    of_compact = ("engine", "theta_device", "compile")
    only = {key: options.pop(key) for key in of_compact if key in options}
    compact = trajectory(deepcopy(model), "compact", make, **options, **only)
    assert_agree(compact, trajectory(deepcopy(model), "dense", make, **options))
    return compact


# The trajectory is that of dense storage.


@every_optimizer
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (4, 1)])
def test_the_trajectory_is_that_of_dense_storage(make: Any, block: tuple[int, int]) -> None:
    states = check(network().double(), make=make, config=replace(CONFIG, block_shape=block))
    shapes = [[leaf.shape for leaf in tree_flatten(state)[0]] for state in states]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize(
    ("penalty", "compile"),
    [*((p, False) for p in ("l2", "l1", "group_l2", None)), ("group_l2", {"backend": "aot_eager"})],
)
def test_every_penalty_acts_as_in_dense_storage(penalty: Any, compile: Any) -> None:
    config = replace(CONFIG, penalty=penalty, penalty_weight=0.3)
    check(network().double(), config=config, compile=compile)


@pytest.mark.parametrize("engine", ["numba", "dense", "reference", "torch_sparse"])
def test_every_engine_takes_the_same_path(engine: str) -> None:
    check(network().double(), engine=engine)


def test_a_forward_set_that_is_the_backward_set() -> None:
    check(network().double(), config=replace(CONFIG, forward_sparsity=0.4))


def test_theta_can_rest_on_the_host() -> None:
    states = check(network().double(), theta_device="cpu")
    weights = states[-1].weights
    assert isinstance(weights, CompactWeights)
    assert {theta.device.type for theta in weights.theta.values()} == {"cpu"}


def test_only_b_is_held() -> None:
    state = tk.init_state(network(), CONFIG, tk.adam())
    for name, masks in tk.masks_of(state).items():
        count = int(masks.backward.sum())
        assert state.weights.values[name].numel() == count
        assert all(tree[name].numel() == count for tree in state.optimizer.slots.values())
    blocks = tk.init_state(network(), replace(CONFIG, block_shape=(4, 2)), tk.adam())
    assert blocks.weights.values["0.weight"].shape[1:] == (4, 2)


# B becomes A: no shape changes, and nothing outside A moves.


@every_optimizer
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_nothing_outside_b_moves_after_exploration(make: Any, block: tuple[int, int]) -> None:
    config = replace(CONFIG, explore_until=5, block_shape=block)
    model = network().double()
    compact = trajectory(model, "compact", make, config)
    dense = trajectory(model, "dense", make, config)
    frozen = tk.dense_params(compact[5])
    for state, other in zip(compact[6:], dense[6:], strict=True):
        for name, masks in tk.masks_of(state).items():
            assert torch.equal(masks.forward, masks.backward)
            assert torch.equal(masks.forward, tk.masks_of(compact[5])[name].forward)
            theta = tk.dense_params(state)[name]
            assert torch.equal(theta[~masks.backward], frozen[name][~masks.backward])
            torch.testing.assert_close(theta, tk.dense_params(other)[name], **TIGHT)
    shapes = [[leaf.shape for leaf in tree_flatten(state)[0]] for state in compact]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize(("block", "powerprop"), [((4, 4), 1.0), ((1, 1), 2.0)])
def test_one_graph_over_refreshes_and_the_end_of_exploration(
    block: tuple[int, int], powerprop: float
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    config = replace(CONFIG, explore_until=7, block_shape=block, powerprop=powerprop)
    make = OPTIMIZERS["momentum"]
    trajectory(network().double(), "compact", make, config, compile={"backend": counter})
    assert counter.frame_count == 1


@pytest.mark.xfail(strict=True, reason="each size of batch is compiled anew")
@torch._dynamo.config.patch(recompile_limit=1)  # type: ignore[untyped-decorator]
def test_dynamic_shapes_compile() -> None:
    batches = [(x[:n], y[:n]) for n, (x, y) in zip(range(3, 12), BATCHES, strict=True)]
    model, make = nn.Linear(8, 4).double(), OPTIMIZERS["momentum"]
    compile = {"dynamic": True, "backend": "aot_eager"}
    check(model, make=make, batches=batches, compile=compile)


# Modules of any kind.


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 4).long().clamp(max=8)
        return self.fc(self.conv(self.embedding(tokens).transpose(1, 2)).mean(2))


class Reading(nn.Module):
    """Reads the weight of a layer directly, beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        size = self.fc.in_features + self.fc.out_features
        return self.fc(x) + nn.functional.linear(x.tanh(), self.fc.weight, self.fc.bias) / size


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.one(x).tanh()))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.again = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.one(x).tanh()))


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.one.register_forward_hook(lambda module, inputs, y: 2 * y)
        self.head.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Scaled(nn.Module):
    """Has a parameter of no dimension, as a temperature is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_a_parameter_of_any_shape_can_be_sparse(compile: Any) -> None:
    every = replace(CONFIG, sparse="*", keep_dense=())
    check(Scaled().double(), make=OPTIMIZERS["momentum"], config=every, compile=compile)


@pytest.mark.parametrize(
    ("make", "compile"),
    [
        *((make, False) for make in (Convolution, Reading, Tied, Hooked, Normed)),
        *((make, {"backend": "aot_eager"}) for make in (Convolution, Reading, Normed)),
    ],
)
def test_modules_of_any_kind_train_as_in_dense_storage(make: Any, compile: Any) -> None:
    """With plain gradient descent: a bias before BatchNorm has a gradient of rounding errors."""
    check(make().double(), make=OPTIMIZERS["momentum"], compile=compile)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_a_layer_of_two_names_trains_as_in_dense_storage(compile: Any) -> None:
    check(Shared().double(), make=OPTIMIZERS["momentum"], compile=compile)


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_a_layer_of_two_names_keeps_its_parameters(storage: str) -> None:
    model = Shared().double()
    held = dict(model.named_parameters())
    trajectory(model, storage, OPTIMIZERS["momentum"], batches=BATCHES[:1])
    found = dict(model.named_parameters())
    assert found.keys() == held.keys()
    assert all(found[name] is parameter for name, parameter in held.items())


@pytest.mark.parametrize(
    ("make", "on_kernels"),
    [
        (Convolution, {"conv.weight", "fc.weight"}),
        (Reading, {"fc.weight"}),
        (Tied, {"one.weight", "head.weight"}),
        (Shared, {"one.weight", "head.weight"}),
        (Hooked, {"one.weight", "head.weight"}),
        (Normed, {"body.0.weight", "head.weight"}),
    ],
)
def test_linear_maps_are_on_kernels(make: Any, on_kernels: set[str]) -> None:
    weights = tk.init_state(make(), CONFIG, tk.sgd(0.1)).weights
    assert isinstance(weights, CompactWeights)
    assert set(weights.patterns) == on_kernels
    assert set(weights.positions) == set(weights.sparse_names) - on_kernels


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize(
    ("make", "training", "compile"),
    [
        *((make, training, False) for make in (Attention, encoder) for training in (True, False)),
        (encoder, True, {"backend": "aot_eager"}),
    ],
)
def test_attention_trains_as_in_dense_storage(make: Any, training: bool, compile: Any) -> None:
    """With plain gradient descent, for the bias of the keys, as above."""
    batches, make_optimizer = batches_of((3, 5, 8), (3, 5, 8)), OPTIMIZERS["momentum"]
    model = make().double().train(training)
    compact = trajectory(model, "compact", make_optimizer, batches=batches, compile=compile)
    assert compact[0].weights.patterns.keys() == set(compact[0].weights.sparse_names)
    assert_agree(compact, trajectory(model, "dense", make_optimizer, batches=batches))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_linear_layers_of_gpt2_train_as_in_dense_storage(compile: Any) -> None:
    model = nn.Sequential(Conv1D(16, 8), nn.GELU(), Conv1D(4, 16))  # type: ignore[no-untyped-call]
    states = check(model.double(), batches=batches_of((3, 5, 8), (3, 5, 4)), compile=compile)
    assert states[0].weights.patterns.keys() == {"0.weight", "2.weight"}


def test_the_mode_of_the_module_is_followed_and_it_is_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    model.double()
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    children = dict(model.named_modules())
    optimizer = tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    lively, _ = step(state, BATCHES[0])
    model.eval()
    calm, metrics = step(state, BATCHES[0])
    assert lively.buffers["1.num_batches_tracked"] == 1
    assert calm.buffers["1.num_batches_tracked"] == 0
    alpha = tk.forward_params(state)
    y = torch.func.functional_call(model, alpha, (BATCHES[0][0],))
    torch.testing.assert_close(metrics.data_loss, nn.functional.mse_loss(y, BATCHES[0][1]))
    model.train()
    again, _ = step(state, BATCHES[0])
    assert again.buffers["1.num_batches_tracked"] == 1
    assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())
    assert dict(model.named_modules()) == children
    assert all(parameter.grad is None for parameter in model.parameters())


class Bound(nn.Module):
    """Reaches its layer through a method that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)
        self.run = self._run

    def _run(self, x: Tensor) -> Tensor:
        return self.one(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Listed(nn.Module):
    """Reaches its layer through a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)
        self.layers = [self.one]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Overridden(nn.Module):
    """A layer whose forward is replaced on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)
        vars(self.one).update(forward=partial(self.twice, self.one))

    @staticmethod
    def twice(layer: nn.Linear, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.one.bias


class Attributed(nn.Module):
    """A layer with an attribute of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)
        self.one.gain = 2.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * self.one.gain


class Asking(nn.Module):
    """Asks what its layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.one, nn.Linear):
            raise TypeError("not a linear layer")
        return self.one(x)


@pytest.mark.parametrize(
    "make",
    [Bound, Listed, Overridden, Attributed, Asking],
)
def test_layers_reached_in_odd_ways_train_as_in_dense_storage(make: Any) -> None:
    check(make().double())


@pytest.mark.parametrize("densities", [(0.5, 0.2), (0.9, 0.8)])
def test_a_refresh_takes_another_configuration(densities: tuple[float, float]) -> None:
    other = tk.TopKastConfig(*densities, method=tk.topkast("value", exchange=None))
    state = tk.init_state(network(), CONFIG, tk.adam())
    after = tk.refresh(state, other)
    expected = tk.compute_masks(tk.dense_params(state), other)
    for name, masks in tk.masks_of(after).items():
        assert all(map(torch.equal, masks, expected[name]))
    assert all(map(torch.equal, tk.dense_params(after).values(), tk.dense_params(state).values()))


@pytest.mark.parametrize("field", ["values", "theta"])
def test_a_refresh_of_leaves_that_require_a_gradient_is_constant(field: str) -> None:
    state = tk.init_state(network(), CONFIG, tk.adam())
    leaves = {n: t.clone().requires_grad_() for n, t in getattr(state.weights, field).items()}
    asked = state._replace(weights=state.weights._replace(**{field: leaves}))  # type: ignore[attr-defined]
    after, expected = tk.refresh(asked, CONFIG), tk.refresh(state, CONFIG)
    for name in after.weights.sparse_names:
        assert not after.weights.values[name].requires_grad
        assert torch.equal(after.weights.values[name], expected.weights.values[name])


def test_a_refresh_may_ask_for_more_places() -> None:
    config, other = tk.TopKastConfig(0.7, 0.4), tk.TopKastConfig(0.9, 0.2)
    state = tk.refresh(tk.init_state(nn.Linear(8, 4), config, tk.adam()), other)
    masks = tk.masks_of(state)["weight"]
    assert (int(masks.forward.sum()), int(masks.backward.sum())) == (3, 26)
    assert all(tree["weight"].shape == (26,) for tree in state.optimizer.slots.values())


@pytest.mark.parametrize(
    ("engine", "compile"),
    [("reference", False), ("numba", False), ("numba", {"backend": "aot_eager"})],
)
def test_a_loss_with_derivatives_of_the_model_trains_as_in_dense_storage(
    engine: Any, compile: Any
) -> None:
    """A penalty on the gradient of the inputs, and one on a tangent."""

    def loss(apply: Any, batch: Batch) -> Tensor:
        x, y = batch
        slope = torch.func.grad(lambda x: apply(x).square().sum())(x)
        tangent = torch.func.jvp(apply, (x,), (torch.ones_like(x),))[1]
        return (apply(x) - y).square().mean() + slope.square().mean() + tangent.square().mean()

    model = network().double()
    make = OPTIMIZERS["adam"]
    found = trajectory(model, "compact", make, loss=loss, compile=compile, engine=engine)
    assert_agree(found, trajectory(model, "dense", make, loss=loss))
