"""Starting from the meta device: the same state as ever, one tensor in memory at a time."""

import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import topkast_func as tk
from tests.distributed.processes import FORKING
from tests.storage import STORAGES
from topkast_func.kernels.columns import MANY, by_columns
from topkast_func.training.memory import give_back

CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2)
OPTIMIZERS = [tk.adamw(0.01), tk.sgd(0.1, momentum=0.9)]


class Network(nn.Module):
    """Linear layers, a convolution, a tied weight, a frozen parameter, buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.first, self.second = nn.Linear(24, 24, bias=False), nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.last = nn.Linear(24, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [batch, 3] of [batch, 1, 8]."""
        hidden = self.norm(self.convolution(x)).flatten(1)
        return self.last(self.second(torch.relu(self.first(hidden))))


def _on_meta() -> Network:
    with torch.device("meta"):
        return Network()


def _drawn(name: str, tensor: Tensor) -> Tensor:
    """Draw what is floating, of a tensor like it; count from 0 what is not."""
    made = torch.empty_like(tensor, device="cpu")
    return made.uniform_(0.1, 1.0) if tensor.is_floating_point() else made.zero_()


def _tensors() -> dict[str, Tensor]:
    """Draw all the tensors that a network has, a tied one under its first name."""
    model = Network()
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: _drawn(name, tensor) for name, tensor in named}


def _holding(tensors: dict[str, Tensor]) -> Network:
    """Return a network in memory, of the tensors."""
    model = Network()
    missing = model.load_state_dict(tensors, strict=False)
    assert missing.missing_keys == ["second.weight"]
    return model


def _loss(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return (apply(batch) - 1.0).square().mean()


def _same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def _loaded(state: tk.TrainState) -> Network:
    """Return a network in memory, of the values that a state began with."""
    theta = {name: tensor.float() for name, tensor in tk.dense_params(state).items()}
    return _holding({**theta, **state.frozen, **state.buffers})


WAYS: list[dict[str, Any]] = [
    {},
    {"seed": 3},
    {"storage": "dense"},
    {"theta_device": "cpu"},
    {"master": torch.float64},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_start_from_the_meta_device_is_that_of_a_module_in_memory(
    options: dict[str, Any], optimizer: tk.Optimizer
) -> None:
    state = tk.init_state(_on_meta(), CONFIG, optimizer, materialize=_drawn, **options)
    expected = tk.init_state(_loaded(state), CONFIG, optimizer, **options)
    _same(state, expected)
    assert list(state.weights.values) == list(expected.weights.values)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": tk.static()},
        {"powerprop": 2.0},
        {"allocation": "erk"},
        {"block_shape": (4, 4), "keep_dense": ("convolution.weight", "last.weight")},
    ],
    ids=str,
)
def test_sets_are_those_of_a_start_at_once(changes: dict[str, Any]) -> None:
    config, optimizer = tk.TopKastConfig(0.75, 0.5, **changes), OPTIMIZERS[0]
    made = _tensors()
    state = tk.init_state(_on_meta(), config, optimizer, materialize=lambda n, t: made[n])
    _same(state, tk.init_state(_holding(made), config, optimizer))


@pytest.mark.parametrize(
    ("storage", "compile"),
    [("compact", False), ("dense", False), ("compact", {"backend": "aot_eager"})],
    ids=str,
)
def test_a_module_on_the_meta_device_trains_as_one_in_memory(storage: Any, compile: Any) -> None:
    optimizer = tk.sgd(1e-4, momentum=0.9)
    meta = _on_meta().double()
    start = tk.init_state(meta, CONFIG, optimizer, materialize=_drawn, storage=storage)

    def run(model: nn.Module, compile: Any) -> Any:
        step = tk.make_train_step(model, _loss, CONFIG, optimizer, compile=compile)
        state = start
        for batch in torch.randn(4, 8, 1, 8, generator=torch.Generator().manual_seed(1)).double():
            state, metrics = step(state, batch)
        return state, metrics

    found, expected = run(meta, compile), run(_loaded(start).double(), False)
    torch.testing.assert_close(found, expected)
    began, ended = (tk.dense_params(s)["first.weight"] for s in (start, found[0]))
    assert not torch.equal(began, ended)


def test_values_follow_from_seed_and_name_alone() -> None:
    def start(names: str, seed: int = 0) -> dict[str, Tensor]:
        model = nn.ModuleDict({name: nn.Linear(8, 8, device="meta") for name in names})
        state = tk.init_state(model, CONFIG, OPTIMIZERS[0], materialize=_drawn, seed=seed)
        return tk.dense_params(state)

    here = torch.get_rng_state()
    found = start("ab")
    assert torch.equal(torch.get_rng_state(), here)
    torch.rand(3)
    turned = start("ba")
    _same(found, {name: turned[name] for name in found})
    assert not torch.equal(found["a.weight"], found["b.weight"])
    assert not torch.equal(found["a.weight"], start("ab", seed=1)["a.weight"])


def test_what_has_values_keeps_them() -> None:
    model = _on_meta()
    model.last = nn.Linear(24, 3)
    asked = []

    def made(name: str, tensor: Tensor) -> Tensor:
        asked.append(name)
        return _drawn(name, tensor)

    state = tk.init_state(model, CONFIG, OPTIMIZERS[0], materialize=made)
    assert torch.equal(tk.dense_params(state)["last.weight"], model.last.weight)
    assert not any(name.startswith("last") for name in asked)
    assert len(asked) == len({*asked}) == len(state.weights.shapes()) - 2 + len(state.buffers)
    assert list(state.weights.values) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("storage", STORAGES)
def test_the_state_shares_no_memory_with_what_was_returned(storage: Any) -> None:
    given = _tensors()
    state = tk.init_state(
        _on_meta(), CONFIG, OPTIMIZERS[0], materialize=lambda n, t: given[n], storage=storage
    )
    before = tree_map(torch.clone, state)
    for tensor in given.values():
        tensor.fill_(7)
    _same(state, before)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (lambda n, t: None, TypeError, "must return a tensor, and returned None for 'weig"),
    "shape": (
        lambda n, t: torch.ones(3),
        ValueError,
        r"returned shape \(3,\) and torch.float32 for 'weight', which has shape \(8, 4\)",
    ),
    "dtype": (
        lambda n, t: torch.ones(t.shape).double(),
        ValueError,
        r"returned shape \(8, 4\) and torch.float64 for 'weight', .* and torch.float32",
    ),
    "no values": (lambda n, t: t, ValueError, "'weight' on the meta device, without values: make"),
    "NaN": (lambda n, t: torch.full(t.shape, torch.nan), ValueError, r"\['weight'\] holds NaN"),
    "itself": (lambda n, t: torch.ones(t.shape).to_sparse(), TypeError, "has layout torch.sparse"),
    "no function": (torch.ones(8, 4), TypeError, "materialize must be a function, got tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_function_cannot_return_is_named(name: str) -> None:
    made, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        tk.init_state(nn.Linear(4, 8, device="meta"), CONFIG, OPTIMIZERS[0], materialize=made)


def test_a_function_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="materialize is for tensors on the meta device, and all"):
        tk.init_state(nn.Linear(4, 8), CONFIG, OPTIMIZERS[0], materialize=_drawn)


# --- files -----------------------------------------------------------------------------------


def test_a_start_from_files_is_that_of_their_tensors(tmp_path: Path) -> None:
    tensors, names = _tensors(), list(_tensors())
    parts = [names[::2], names[1::2]]
    for i, part in enumerate(parts):
        save_file({name: tensors[name].clone() for name in part}, tmp_path / f"{i}.safetensors")
    read = tk.from_safetensors(*(tmp_path / f"{i}.safetensors" for i in range(2)))
    state = tk.init_state(_on_meta(), CONFIG, OPTIMIZERS[0], materialize=read)
    _same(state, tk.init_state(_holding(tensors), CONFIG, OPTIMIZERS[0]))


def test_what_a_file_has_not_or_otherwise_is_named(tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", nn.Linear(4, 8, device="meta")

    def start() -> tk.TrainState:
        read = tk.from_safetensors(path)
        return tk.init_state(model, CONFIG, OPTIMIZERS[0], materialize=read)

    save_file({"weight": torch.ones(8, 4)}, path)
    with pytest.raises(ValueError, match=r"'bias' is not in .*x.safetensors, which has \['weight'"):
        start()
    save_file({"weight": torch.ones(8, 4), "bias": torch.ones(9)}, path)
    with pytest.raises(ValueError, match=r"\(9,\) and torch.float32 for 'bias', which has .*\(8,"):
        start()
    save_file({"weight": torch.ones(8, 4).half(), "bias": torch.ones(8)}, path)
    with pytest.raises(ValueError, match=r"torch.float16 for 'weight', .* and torch.float32"):
        start()


# --- memory ----------------------------------------------------------------------------------

LAYERS, WIDTH = 16, 1024
LARGEST = 4 * WIDTH * WIDTH
ONE = 1, 5000, tk.sgd(0.1)
GROUPS = {"pattern": "1:8", "forward_sparsity": None, "backward_sparsity": 0.75}
STARTS: dict[str, tuple[int, int, tk.Optimizer, dict[str, Any]]] = {  # layers, features of each, …
    "one in half precision": (*ONE, {}),
    "many": (LAYERS, WIDTH, tk.adamw(0.01), {}),
    "one": (*ONE, {}),
    "one in blocks": (*ONE, {"block_shape": (4, 4)}),
    "one in groups": (*ONE, GROUPS),
    "one drawn": (*ONE, {"method": tk.static(), "backward_sparsity": None}),
    "one drawn in groups": (*ONE, GROUPS | {"method": tk.random_backward()}),
    "one drawn beside": (*ONE, {"method": tk.random_backward()}),
    "one of powers": (*ONE, {"powerprop": 2.0}),
    "one with all in B": (*ONE, {"method": tk.ste(), "backward_sparsity": None}),
    "one still dense": (*ONE, {"method": tk.gmp(0, 10), "backward_sparsity": None}),
}


def _deep(
    device: str, layers: int = LAYERS, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    kind = {"device": device, "dtype": dtype}
    made = (nn.Linear(width, width, bias=False, **kind) for _ in range(layers))
    return nn.Sequential(*made)


def _ones(name: str, tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").normal_()


def _grown(start: str, streamed: bool, end: Any) -> None:
    """Send by how much the process grew at most while a state began, and the bytes of the state.

    The first kernel that LLVM makes takes 60 MB once in a process, and has been made before.
    """
    torch.set_num_threads(1)
    layers, width, optimizer, fields = STARTS[start]
    config = replace(tk.TopKastConfig(0.9, 0.8), **fields)
    dtype = torch.bfloat16 if "half" in start else torch.float32
    tk.init_state(nn.Linear(WIDTH, WIDTH), config, optimizer)
    by_columns(torch.arange(MANY, dtype=torch.int32), WIDTH, MANY // WIDTH)
    give_back()
    process = psutil.Process()
    before = process.memory_info().rss
    if streamed:
        meta = _deep("meta", layers, width, dtype)
        state = tk.init_state(meta, config, optimizer, materialize=_ones)
    else:
        state = tk.init_state(_deep("cpu", layers, width), config, optimizer)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most *= 1 if sys.platform == "darwin" else 1024
    held = sum(leaf.nbytes for leaf in tree_leaves(state))
    end.send((most - before, held))


def _measured(start: str, streamed: bool) -> tuple[int, int]:
    own, end = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=_grown, args=(start, streamed, end))
    process.start()
    end.close()
    found: tuple[int, int] = own.recv()
    process.join()
    return found


@pytest.mark.parametrize("start", STARTS)
def test_a_start_takes_no_more_than_the_state_and_the_largest_tensor(start: str) -> None:
    grown, held = _measured(start, streamed=True)
    layers, width, *_ = STARTS[start]
    largest = (2 if "half" in start else 4) * width * width
    assert held > layers * largest
    assert grown < 1.1 * (held + largest)  # of which a tenth is for what the allocator keeps


def test_a_start_of_a_module_in_memory_takes_that_and_the_state() -> None:
    at_once, held = _measured("many", streamed=False)
    assert at_once > held + 0.9 * LAYERS * LARGEST
