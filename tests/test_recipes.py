"""Recipes for learning rates and freezing, as a reader would copy them."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import topkast_func as tk
from tests.storage import STORAGES


def warm_up_and_cosine(peak: float, warm_up: int, total: int) -> Callable[[Tensor], float]:
    """Rise to ``peak`` in ``warm_up`` steps, then fall along half a cosine to 0."""

    def schedule(step: Tensor) -> float:
        t = int(step)
        if t < warm_up:
            return peak * (t + 1) / warm_up
        way = min(1.0, (t - warm_up) / (total - warm_up))
        return peak * 0.5 * (1.0 + math.cos(math.pi * way))

    return schedule


def one_rate(
    lr: float, params: Mapping[str, Tensor], config: tk.TopKastConfig, **options: Any
) -> tk.Optimizer:
    """Divide the rate of each sparse weight by its density, so that one lr serves them all.

    Dey et al. (2024), "Sparse maximal update parameterization", table 1: the rate of Adam in
    proportion to 1 / D. (Beside it, weights are to start larger by 1 / √D.)
    """
    groups = {
        name: tk.adamw(lr / sparsity.forward_density, **options)
        for name, sparsity in tk.allocate(params, config).items()
    }
    return tk.partition({**groups, "*": tk.adamw(lr, **options)})


def _mse(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (apply(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_warm_up_and_cosine(compile: Any) -> None:
    """The update of plain descent on a linear loss is the rate."""
    optimizer = tk.sgd(warm_up_and_cosine(0.5, 4, 12))
    config = tk.TopKastConfig(0.5, 0.0, penalty=None, refresh_every=None)
    params = {"weight": torch.tensor([[4.0, 3.0], [2.0, 1.0]], dtype=torch.float64)}
    step = tk.make_train_step(
        lambda p, x: (p["weight"] * x).sum(), lambda f, x: f(x), config, optimizer, compile=compile
    )
    state, rates = tk.init_state(params, config, optimizer), []
    for _ in range(14):
        before = tk.dense_params(state)["weight"]
        state, _ = step(state, torch.ones(2, 2, dtype=torch.float64))
        rates.append((before - tk.dense_params(state)["weight"]).mean())
    up, down = torch.stack(rates[:4]), torch.stack(rates[4:])
    assert_close(up, torch.tensor([0.125, 0.25, 0.375, 0.5], dtype=torch.float64))
    halves = [0.25 * (1.0 + math.cos(math.pi * min(t, 8) / 8)) for t in range(10)]
    assert_close(down, torch.tensor(halves, dtype=torch.float64))
    assert torch.equal(rates[-1], torch.zeros((), dtype=torch.float64))


def _first_move(make: Callable[..., tk.Optimizer], sparsity: float) -> float:
    """How far the first step of Adam moves the outputs of a layer."""
    torch.manual_seed(0)
    model, x = nn.Linear(256, 64, bias=False), torch.randn(1, 256)
    config = tk.TopKastConfig(sparsity, 0.0, penalty=None)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    optimizer = make(params, config)
    step = tk.make_train_step(
        model, lambda apply, x: apply(x).sum(), config, optimizer, compile=False
    )
    before = tk.init_state(model, config, optimizer)
    after, _ = step(before, x)
    moved = tk.dense_params(after)["weight"] - tk.dense_params(before)["weight"]
    return float((x @ (moved * tk.masks_of(before)["weight"].forward).T).abs().mean())


def test_one_learning_rate_moves_layers_of_all_sparsities_as_far() -> None:
    sparsities = (0.0, 0.5, 0.8, 0.9, 0.95)
    scaled = [_first_move(lambda *of: one_rate(1e-3, *of, weight_decay=0.0), s) for s in sparsities]
    plain = [_first_move(lambda *_: tk.adamw(1e-3, weight_decay=0.0), s) for s in sparsities]
    assert max(scaled) / min(scaled) < 1.3
    assert max(plain) / min(plain) > 15.0


@pytest.mark.parametrize("storage", STORAGES)
def test_freezing_some_layers_from_a_step_on(storage: Any) -> None:
    """Their rate is 0: decay and momentum move nothing either, and their sets stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    config = tk.TopKastConfig(0.7, 0.4, refresh_every=2, method=tk.topkast("value", exchange=None))
    optimizer = tk.partition({
        "0.*": tk.adamw(lambda step: 0.1 if step < 3 else 0.0),
        "*": tk.adamw(0.1),
    })
    step = tk.make_train_step(model, _mse, config, optimizer, compile=False)
    states = [tk.init_state(model, config, optimizer, storage=storage)]
    for _ in range(9):
        batch = torch.randn(8, 6), torch.randn(8, 4)
        states.append(step(states[-1], batch)[0])
    for t, (before, after) in enumerate(itertools.pairwise(states)):
        old, new = tk.dense_params(before), tk.dense_params(after)
        frozen = [torch.equal(old[name], new[name]) for name in old if name.startswith("0.")]
        assert frozen == [t >= 3] * 2
        assert not torch.equal(old["2.weight"], new["2.weight"])
    ends = [tk.masks_of(states[t]) for t in (5, 9)]
    assert torch.equal(ends[0]["0.weight"].forward, ends[1]["0.weight"].forward)
    assert not torch.equal(ends[0]["2.weight"].forward, ends[1]["2.weight"].forward)
