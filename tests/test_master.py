"""θ in float32 beside a half-precision forward pass."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import topkast_func as tk
from tests.storage import STORAGES, dense_slots

HALVES = [torch.float16, torch.bfloat16]
CONFIG = tk.TopKastConfig(0.5, 0.2, refresh_every=50, penalty_weight=1e-3)
ABSENT = 7
"""The row of the embedding whose word is in no batch."""


class Network(nn.Module):
    """An embedding, a layer whose first unit is dead, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8, 16)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)
        with torch.no_grad():
            self.hidden.bias[0] = -100.0

    def forward(self, words: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.hidden(self.words(words).mean(1))))
        return result


def loss_fn(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(apply(batch[0]).float(), batch[1])


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(ABSENT, (count, 32, 3), generator=generator)
    return [(chosen, chosen[:, 0] % 4) for chosen in words]


def trained(
    dtype: torch.dtype,
    steps: int,
    *,
    compile: Any = False,
    config: tk.TopKastConfig = CONFIG,
    **options: Any,
) -> tuple[tk.TrainState, list[float]]:
    model, optimizer = Network().to(dtype), tk.adamw(lr=1e-2)
    state = tk.init_state(model, config, optimizer, **options)
    train_step = tk.make_train_step(model, loss_fn, config, optimizer, compile=compile)
    losses = []
    for batch in batches(steps):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics.data_loss))
    return state, losses


@cache
def in_float32(storage: str) -> list[float]:
    return trained(torch.float32, 200, storage=storage)[1]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("half", HALVES)
def test_two_hundred_steps_follow_those_in_float32(half: torch.dtype, storage: Any) -> None:
    expected = in_float32(storage)
    state, losses = trained(half, 200, storage=storage, master=torch.float32)
    for name, theta in tk.dense_params(state).items():
        assert theta.dtype == torch.float32, name
        assert theta.isfinite().all(), name
    for tree in dense_slots(state).values():
        assert all(slot.isfinite().all() for slot in tree.values())
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(losses, expected, rtol=0, atol=10 * torch.finfo(half).eps)


@pytest.mark.parametrize("half", HALVES)
def test_without_a_master_two_hundred_steps_stay_finite(half: torch.dtype) -> None:
    state, losses = trained(half, 200)
    assert all(theta.isfinite().all() for theta in tk.dense_params(state).values())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("storage", "powerprop"), [("compact", 2.0), ("dense", 1.0)])
def test_compiled_equals_eager(storage: Any, powerprop: float) -> None:
    config = replace(CONFIG, refresh_every=2, powerprop=powerprop)
    options: Any = {"config": config, "storage": storage, "master": torch.float32}
    eager, losses = trained(torch.float16, 5, **options)
    compiled, expected = trained(torch.float16, 5, compile={"backend": "aot_eager"}, **options)
    start, _ = trained(torch.float16, 0, **options)
    first, _ = trained(torch.float16, 1, **options)
    for name, masks in tk.masks_of(start).items():
        moved = tk.dense_params(first)[name] != tk.dense_params(start)[name]
        assert moved[masks.backward & ~masks.forward].any()
        assert not moved[~masks.backward].any()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(tk.dense_params(compiled), tk.dense_params(eager))


def test_the_gradient_on_what_explores_passes_through_the_rounding() -> None:
    config = replace(CONFIG, penalty=None)
    model, optimizer = Network().half(), tk.sgd(1.0)
    state = tk.init_state(model, config, optimizer, master=torch.float32)
    train_step = tk.make_train_step(model, loss_fn, config, optimizer, compile=False)
    after, _ = train_step(state, batches(1)[0])
    gradients = tk.dense_gradients(model, loss_fn, state, batches(1)[0])
    for name, masks in tk.masks_of(state).items():
        explores = masks.backward & ~masks.forward
        found = (tk.dense_params(state)[name] - tk.dense_params(after)[name])[explores]
        assert gradients[name].dtype == torch.float16
        assert found.any()
        torch.testing.assert_close(found, gradients[name][explores].float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_updates_below_the_spacing_of_half_precision_add_up(storage: Any) -> None:
    moved = []
    for master in (None, torch.float32):
        theta = {"weight": torch.ones(4, 4, dtype=torch.float16)}
        config, optimizer = tk.TopKastConfig(0.0, 0.0, penalty=None), tk.sgd(1e-5)
        state = tk.init_state(theta, config, optimizer, storage=storage, master=master)
        train_step = tk.make_train_step(
            lambda params, x: params["weight"] @ x,
            lambda apply, x: apply(x).sum().float(),
            config,
            optimizer,
            compile=False,
        )
        for _ in range(100):
            state, _ = train_step(state, torch.ones(4, dtype=torch.float16))
        moved.append(1.0 - tk.forward_params(state)["weight"].float())
    assert not moved[0].any()
    torch.testing.assert_close(moved[1], torch.full((4, 4), 1e-3), rtol=0.05, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_what_inference_needs_has_the_dtype_of_the_model(storage: Any) -> None:
    state, _ = trained(torch.float16, 3, storage=storage, master=torch.float32)
    model = Network().half()
    alpha = tk.forward_params(state)
    assert {name: t.dtype for name, t in alpha.items()} == dict.fromkeys(alpha, torch.float16)
    model.load_state_dict(alpha, assign=True)
    words = batches(1)[0][0]
    torch.testing.assert_close(model(words), torch.func.functional_call(model, alpha, (words,)))
    for name, masks in tk.masks_of(state).items():
        assert torch.equal(alpha[name] != 0, masks.forward)


def test_parameters_that_are_as_wide_stay_as_they_are() -> None:
    params = {
        "a.weight": torch.randn(4, 4).bfloat16(),
        "b.weight": torch.randn(4, 4),
        "c.weight": torch.randn(4, 4).double(),
    }
    state = tk.init_state(params, CONFIG, tk.adamw(), master=torch.float32)
    kept = [tensor.dtype for tensor in tk.dense_params(state).values()]
    assert kept == [torch.float32, torch.float32, torch.float64]
    computed = [tensor.dtype for tensor in tk.forward_params(state).values()]
    assert computed == [tensor.dtype for tensor in params.values()]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_resumed_run_equals_the_uninterrupted_one(storage: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, refresh_every=2, method=tk.rigl())
    model, optimizer = Network().half(), tk.adamw(lr=1e-2)
    state = tk.init_state(model, config, optimizer, storage=storage, master=torch.float32)
    train_step = tk.make_train_step(model, loss_fn, config, optimizer, compile=False)
    path = [state]
    for batch in batches(6):
        path.append(train_step(path[-1], batch)[0])
    tk.save(path[3], tmp_path / "state", config)
    state = tk.load(tmp_path / "state", model=model, optimizer=optimizer)
    for batch in batches(6)[3:]:
        state, _ = train_step(state, batch)
    for one, other in zip(tree_leaves(state), tree_leaves(path[-1]), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"float16, the model torch\.bfloat16"):
        tk.load(tmp_path / "state", model=Network().bfloat16())


@pytest.mark.parametrize(
    ("master", "error"),
    [(torch.float16, ValueError), (torch.int32, ValueError), ("float32", TypeError)],
)
def test_what_is_no_master_is_refused(master: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"master must be torch.float32, torch.float64 or None, got"):
        tk.init_state(Network().half(), CONFIG, tk.sgd(0.1), master=master)


class Rounded(Network):
    """In float32, rounded wherever a network of half precision rounds."""

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.half_precision = half

    def forward(self, words: Tensor) -> Tensor:
        def rounded(tensor: Tensor) -> Tensor:
            return tensor + (tensor.to(self.half_precision).float() - tensor).detach()

        def layer(module: nn.Linear, x: Tensor) -> Tensor:
            assert module.bias is not None
            return rounded(nn.functional.linear(x, rounded(module.weight), rounded(module.bias)))

        mean = rounded(nn.functional.embedding(words, rounded(self.words.weight)).mean(1))
        return layer(self.head, torch.relu(layer(self.hidden, mean)))


def path_of(model: nn.Module, master: torch.dtype | None) -> tuple[list[float], list[Any]]:
    """Return the losses of 60 steps, and the sets of each."""
    config, optimizer = replace(CONFIG, refresh_every=3), tk.adamw(lr=1e-2)
    state = tk.init_state(model, config, optimizer, master=master)
    train_step = tk.make_train_step(model, loss_fn, config, optimizer, compile=False)
    losses, sets = [], []
    for batch in batches(60):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics.data_loss))
        sets.append(torch.cat([m.flatten() for pair in tk.masks_of(state).values() for m in pair]))
    return losses, sets


@pytest.mark.parametrize("half", HALVES)
def test_sets_are_those_of_a_float32_run_that_rounds_until_a_tie(half: torch.dtype) -> None:
    """From a tie on, runs part by any rounding: float32 does so too when moved by half's ε."""
    losses, sets = path_of(Network().to(half), torch.float32)
    expected, others = path_of(Rounded(half).to(half).float(), None)
    parted = [not torch.equal(*both) for both in zip(sets, others, strict=True)]
    together = parted.index(True) if any(parted) else len(parted)
    assert together > 6  # two refreshes at the least
    torch.testing.assert_close(
        losses[:together], expected[:together], rtol=0, atol=0.25 * torch.finfo(half).eps
    )


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the float32 tensors of a shape that are made of one of any dtype."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.count += result.dtype == torch.float32 and tuple(result.shape) == self.shape
        return result


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_weight_is_copied_once_at_the_start(storage: Any, dtype: torch.dtype) -> None:
    model = nn.Linear(11, 13, bias=False, dtype=dtype)
    sets = _sets(model)
    with _Copies((13, 11)) as copies:
        state = tk.init_state(
            model, CONFIG, tk.sgd(0.1), storage=storage, master=torch.float32, masks=sets
        )
    assert copies.count == 1
    assert tk.dense_params(state)["weight"].data_ptr() != model.weight.data_ptr()


def _sets(model: nn.Module) -> Any:
    return tk.compute_masks(dict(model.named_parameters()), CONFIG)
