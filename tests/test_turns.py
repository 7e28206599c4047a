"""Threads get the results that they would get alone, and leave modules whole."""

import copy
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import topkast_func as tk
from topkast_func import turns
from topkast_func.training.random_numbers import Draws
from topkast_func.turns import (
    EVERYTHING,
    NO_RANDOM_NUMBERS,
    RANDOM_NUMBERS,
    Claims,
    in_turn,
    require,
)

THREADS, STEPS = 4, 25
PATIENCE = 300
"""Seconds after which a thread that still waits is taken to wait for ever."""

CONFIG = tk.TopKastConfig(forward_sparsity=0.7, backward_sparsity=0.4, refresh_every=7)
OPTIMIZER = tk.adam(0.01)
EAGER = {"backend": "eager"}


def network(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(dropout))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def mse(apply: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def step_of(model: nn.Module, compile: Any = False, loss: Any = mse) -> Any:
    return tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=compile)


def run(train_step: Any, state: tk.TrainState, seed: int, steps: int = STEPS) -> tk.TrainState:
    for number in range(steps):
        state, _ = train_step(state, batch(seed * steps + number))
    return state


def at_once(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do each work in a thread of its own, all of them at the same time."""
    gate = threading.Barrier(len(works), timeout=PATIENCE)

    def start(work: Callable[[], Any], done: Future[Any]) -> None:
        gate.wait()
        try:
            done.set_result(work())
        except BaseException as failure:
            done.set_exception(failure)

    results: list[Future[Any]] = [Future() for _ in works]
    for work, done in zip(works, results, strict=True):
        threading.Thread(target=start, args=(work, done), daemon=True).start()
    return [done.result(PATIENCE) for done in results]


def same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def assert_whole(model: nn.Module) -> None:
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 4
    assert not any("forward" in vars(part) for part in copy.deepcopy(model).modules())


def own_steps(dropout: float, compile: Any, threads: int) -> tuple[list[nn.Module], list[Any]]:
    models = [network(dropout) for _ in range(threads)]
    return models, [step_of(model, compile) for model in models]


def shared_step(dropout: float, compile: Any, threads: int) -> tuple[list[nn.Module], list[Any]]:
    model = network(dropout)
    return [model], [step_of(model, compile)] * threads


def shared_module(dropout: float, compile: Any, threads: int) -> tuple[list[nn.Module], list[Any]]:
    model = network(dropout)
    return [model], [step_of(model, compile), step_of(model, compile)] * (threads // 2)


SHARINGS = (own_steps, shared_step, shared_module)


@pytest.mark.parametrize(
    ("sharing", "dropout", "compile"),
    [
        *((sharing, dropout, False) for sharing in SHARINGS for dropout in (0.0, 0.5)),
        *((own_steps, 0.0, EAGER), (shared_step, 0.5, EAGER), (shared_module, 0.0, EAGER)),
    ],
)
def test_each_thread_gets_what_it_would_get_alone(
    sharing: Any, dropout: float, compile: Any
) -> None:
    threads = 2 if compile else THREADS
    start = tk.init_state(network(dropout), CONFIG, OPTIMIZER)
    alone = step_of(network(dropout), compile)
    expected = [run(alone, start, seed) for seed in range(threads)]
    assert not same(expected[0], expected[1])
    models, steps = sharing(dropout, compile, threads)
    found = at_once([partial(run, step, start, seed) for seed, step in enumerate(steps)])
    assert [same(a, b) for a, b in zip(found, expected, strict=True)] == [True] * threads
    for model in models:
        assert_whole(model)


def test_parts_that_two_models_share_are_used_by_one_of_them_at_a_time() -> None:
    trunk = network(0.5)
    models = [nn.Sequential(trunk, nn.Linear(3, 3)) for _ in range(4)]
    starts = [tk.init_state(model, CONFIG, OPTIMIZER) for model in models]
    works = [
        partial(run, step_of(model), start, 0) for model, start in zip(models, starts, strict=True)
    ]
    expected = [work() for work in works]
    found = at_once(works)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert_whole(trunk)


def test_every_way_to_run_a_shared_module_takes_turns() -> None:
    model = network(0.0)
    start = tk.init_state(model, CONFIG, OPTIMIZER)
    params, masks = tk.dense_params(start), tk.masks_of(start)
    sets = tk.index_masks(model, masks)
    assert sets["0.weight"] is not masks["0.weight"]
    train_step, x = step_of(model), batch(0)[0]

    def gradient() -> Any:
        loss = lambda p: tk.penalized_loss(model, mse, p, sets, batch(0), CONFIG)  # noqa: E731
        return torch.func.grad(loss)(params)

    ways: list[Callable[[], Any]] = [
        lambda: tk.sparse_forward(model, params, sets, x),
        lambda: tk.sparse_forward(model, params, masks, x),
        gradient,
        lambda: tk.dense_gradients(model, mse, start, batch(0)),
        lambda: train_step(start, batch(0)),
        lambda: tk.init_state(model, CONFIG, OPTIMIZER),
        lambda: step_of(model)(start, batch(0)),
        lambda: next(iter(tk.index_masks(model, masks)["0.weight"])),
    ]
    expected = [way() for way in ways]
    found = at_once([lambda way=way: [way() for _ in range(STEPS)] for way in ways])  # type: ignore[misc]
    for results, result in zip(found, expected, strict=True):
        assert all(same(each, result) for each in results)
    assert_whole(model)


def test_steps_in_the_loss_of_each_other_wait_for_nobody_for_ever() -> None:
    models = [network(0.5), network(0.0)]
    starts = [tk.init_state(model, CONFIG, OPTIMIZER) for model in models]
    inner = [step_of(model) for model in models]

    def loss(other: int, apply: Any, batch: Any) -> Tensor:
        return mse(apply, batch) * inner[other](starts[other], batch)[1].loss

    outer = [step_of(model, loss=partial(loss, 1 - i)) for i, model in enumerate(models)]
    works = [partial(run, outer[i % 2], starts[i % 2], i, 20) for i in range(THREADS)]
    expected = [work() for work in works]
    assert all(same(a, b) for a, b in zip(at_once(works), expected, strict=True))


def test_a_thread_whose_step_fails_stands_in_nobodys_way() -> None:
    model = network(0.5)
    start = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = step_of(model)

    misfit = (batch(0)[0], batch(0)[1][:, :2])

    def failing() -> None:
        for _ in range(STEPS):
            with pytest.raises((RuntimeError, UserWarning), match="size"):
                train_step(start, misfit)

    expected = run(train_step, start, 0)
    found = at_once([failing, partial(run, train_step, start, 0)])
    assert same(found[1], expected)
    assert_whole(model)


# Random numbers are found out, and belong to the step.


class Sometimes(nn.Module):
    """Draws random numbers for positive inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * torch.rand_like(x) if x[0, 0] > 0 else x)


def noisy(optimizer: tk.Optimizer) -> tk.Optimizer:
    def update(grads: Any, *rest: Any) -> Any:
        return optimizer.update({n: torch.randn_like(g) for n, g in grads.items()}, *rest)

    return replace(optimizer, update=update)


@pytest.mark.parametrize("noise", ["model", "optimizer"])
def test_numbers_that_only_later_steps_draw_follow_from_the_state_too(noise: str) -> None:
    model = Sometimes() if noise == "model" else nn.Linear(6, 3)
    optimizer = tk.sgd(0.1) if noise == "model" else noisy(tk.sgd(0.1))
    start = tk.init_state(model, CONFIG, optimizer)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        held = torch.get_rng_state()
        train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
        state, _ = train_step(start, (-torch.ones(4, 6), torch.ones(4, 3)))
        results.append(train_step(state, (torch.ones(4, 6), torch.ones(4, 3))))
        assert torch.equal(torch.get_rng_state(), held)
    assert same(*results)


def test_work_that_is_found_to_draw_meanwhile_claims_the_random_numbers() -> None:
    state = tk.init_state(network(0.5), CONFIG, OPTIMIZER)
    draws, claimed = Draws(RANDOM_NUMBERS), []

    def work() -> Tensor:
        claimed.append(turns._USED[threading.get_ident()])
        return torch.rand(3)

    first = in_turn(RANDOM_NUMBERS, lambda: draws.run("kind", state, work))
    again = in_turn(NO_RANDOM_NUMBERS, lambda: draws.run("kind", state, work))
    assert torch.equal(first, again)
    assert all(claims >= RANDOM_NUMBERS for claims in claimed)


def test_steps_of_two_modules_that_draw_nothing_run_side_by_side() -> None:
    meeting = threading.Barrier(1)

    def loss(apply: Any, batch: Any) -> Tensor:
        meeting.wait()
        return mse(apply, batch)

    models = [network(0.0), network(0.0)]
    steps = [step_of(model, loss=loss) for model in models]
    start = tk.init_state(models[0], CONFIG, OPTIMIZER)
    expected = [train_step(start, batch(0)) for train_step in steps]
    meeting = threading.Barrier(2, timeout=PATIENCE)
    found = at_once([partial(train_step, start, batch(0)) for train_step in steps])
    assert same(found, expected)


def test_steps_that_draw_and_steps_that_do_not_leave_each_other_alone() -> None:
    models = [network(0.5 * (i % 2)) for i in range(THREADS)]
    start = tk.init_state(models[0], CONFIG, OPTIMIZER)
    held = torch.get_rng_state()
    works = [partial(run, step_of(model), start, i) for i, model in enumerate(models)]
    expected = [work() for work in works]
    assert same(at_once(works), expected)
    assert torch.equal(torch.get_rng_state(), held)


# The turns themselves.


ONE, TWO = frozenset({1}), frozenset({2})


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        (ONE, ONE, True),
        (ONE | TWO, TWO, True),
        (ONE, TWO, False),
        (ONE, EVERYTHING, True),
        (EVERYTHING, NO_RANDOM_NUMBERS, True),
        (RANDOM_NUMBERS, RANDOM_NUMBERS, True),
        (RANDOM_NUMBERS, NO_RANDOM_NUMBERS, True),
        (NO_RANDOM_NUMBERS, RANDOM_NUMBERS, True),
        (NO_RANDOM_NUMBERS, NO_RANDOM_NUMBERS, False),
        (ONE | RANDOM_NUMBERS, NO_RANDOM_NUMBERS | TWO, True),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_turns_are_at_once_where_their_claims_do_not_clash(
    one: Claims, other: Claims, clash: bool, within: bool
) -> None:
    """What the second claims it claims at once, or in a turn that it has already."""
    inside, joined, left = threading.Event(), threading.Event(), threading.Event()

    def first() -> bool:
        inside.set()
        met = joined.wait(0.1 if clash else PATIENCE)
        left.set()
        return met

    def second() -> bool:
        joined.set()
        return left.wait(PATIENCE)

    def come() -> bool:
        inside.wait(PATIENCE)
        claimed = partial(in_turn, other, second)
        return in_turn(frozenset({3}), claimed) if within else claimed()

    assert at_once([partial(in_turn, one, first), come]) == [not clash, True]


def test_a_turn_within_a_turn_adds_to_it_and_gives_that_back() -> None:
    starts: list[int] = []

    def outer() -> str:
        starts.append(1)
        assert starts == [1]
        in_turn(ONE, lambda: in_turn(TWO, lambda: require(ONE | TWO)))
        return at_once([partial(in_turn, TWO, lambda: "done")])[0]

    assert in_turn(ONE, outer) == "done"


def test_a_turn_that_needs_more_starts_again() -> None:
    starts: list[int] = []

    def work() -> int:
        starts.append(1)
        if len(starts) == 1:
            try:
                require(RANDOM_NUMBERS)
            except Exception:
                starts.append(100)
        require(ONE)
        return len(starts)

    assert in_turn(ONE, work) == 2


def test_a_turn_that_has_what_it_needs_goes_on() -> None:
    for held in (RANDOM_NUMBERS, EVERYTHING):
        starts: list[int] = []

        def work(starts: list[int] = starts) -> None:
            starts.append(1)
            require(RANDOM_NUMBERS)
            require(NO_RANDOM_NUMBERS)

        in_turn(held, work)
        assert starts == [1]


def test_a_turn_with_a_module_alone_does_not_know_that_nobody_draws() -> None:
    starts: list[int] = []

    def work() -> int:
        starts.append(1)
        require(NO_RANDOM_NUMBERS)
        return len(starts)

    assert in_turn(frozenset({1}), work) == 2


def test_who_comes_later_waits_behind_who_waits_for_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second waits for what is free, but the first, who needs it too, came before."""
    monkeypatch.setattr(turns, "_USED", {3: frozenset({1})})
    monkeypatch.setattr(turns, "_WAITING", {1: frozenset({1, 2}), 2: frozenset({2})})
    assert not turns._is_next(1)
    assert not turns._is_next(2)
    turns._USED.clear()
    assert turns._is_next(1)


def test_a_forked_process_has_its_turn() -> None:
    fork = multiprocessing.get_context("fork")

    def child() -> None:
        in_turn(frozenset({1}), lambda: None)

    def parent() -> Any:
        process = fork.Process(target=child)
        process.start()
        process.join(PATIENCE)
        return process.exitcode

    assert in_turn(frozenset({1}), lambda: at_once([parent])) == [0]


def test_a_step_compiles_while_nobody_else_has_a_turn() -> None:
    alone: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        alone.append(any(used >= EVERYTHING for used in turns._USED.values()))
        return graph.forward

    model = network(0.0)
    config = replace(CONFIG, method=tk.rigl(), refresh_every=3)
    state = tk.init_state(model, config, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, config, OPTIMIZER, compile={"backend": backend})
    for number in range(7):
        state, _ = train_step(state, tuple(t[: 10 + number // 4] for t in batch(0)))
    assert alone == [True] * 4


class Waiting(nn.Module):
    """Waits within its forward pass, where other tensors stand in its parameters' place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.inside, self.go = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.inside.set()
        assert self.go.wait(PATIENCE)
        return self.layer(x)


@pytest.mark.parametrize("use", ["init_state", "index_masks", "kernels"])
def test_parameters_that_a_pass_has_replaced_for_a_while_are_waited_for(use: str) -> None:
    model = Waiting()
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    params, masks = tk.dense_params(state), tk.masks_of(state)
    uses: dict[str, Callable[[], Any]] = {
        "init_state": lambda: tk.init_state(model, CONFIG, OPTIMIZER),
        "index_masks": lambda: tk.index_masks(model, masks),
        "kernels": lambda: step_of(model),
    }

    def beside() -> Any:
        assert model.inside.wait(PATIENCE)
        threading.Timer(0.2, model.go.set).start()
        return uses[use]()

    passed, used = at_once([lambda: tk.sparse_forward(model, params, masks, batch(0)[0]), beside])
    assert passed.shape == (16, 3)
    assert used is not None
    assert isinstance(model.layer.weight, nn.Parameter)
