"""Faults of one rank: all ranks say so, and none trains on."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import register_backend

import topkast_func as tk
from tests.distributed.processes import Outcome, results, together
from topkast_func.types import changed

CONFIG, ADAM = tk.TopKastConfig(0.75, 0.5, refresh_every=5), tk.adamw(lr=0.01)
AT, STEPS, SHORT = 7, 12, 5.0
LOST = (
    r"RuntimeError: rank 0 of 2 waited in vain for rank 1 in step 7: a process has ended or hangs"
)


def _network(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def _loss(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return (apply(batch) - 1.0).square().mean()


def _step(model: Any, config: tk.TopKastConfig = CONFIG, **options: Any) -> Any:
    plain = {"compile": False, "process_group": dist.group.WORLD}
    return tk.make_train_step(model, _loss, config, ADAM, **(plain | options))


# --- faults that one rank alone sees -------------------------------------------------------


def _raises(batch: Tensor) -> NoReturn:
    raise ArithmeticError("a bad batch")


def _is_killed(batch: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@cache
def _sleeps() -> None:
    time.sleep(2 * SHORT)


def _hangs(batch: Tensor) -> None:
    """Hang once: the forward pass of a step that failed is tried again."""
    _sleeps()


def _train_with(rank: int, fault: Callable[[Tensor], None] | None, catches: bool) -> int:
    """Train, with a fault in the forward pass of rank 1 at one step; or it has fewer batches."""
    model = _network()
    now = -1

    def forward(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
        if now == AT and rank == 1 and fault:
            fault(batch)
        return _loss(apply, batch)

    state = tk.init_state(model, CONFIG, ADAM)
    step = tk.make_train_step(
        model, forward, CONFIG, ADAM, compile=False, process_group=dist.group.WORLD
    )
    for number in range(AT if rank == 1 and fault is None else STEPS):
        now = number
        try:
            state, _ = step(state, torch.randn(4, 6))
        except ArithmeticError:
            if not catches:
                raise
    return int(state.step)


def _faulty(fault: Any, catches: bool = False) -> list[Outcome]:
    return together(_train_with, fault, catches, patience=SHORT if fault is _hangs else 60.0)


def _goes_its_own_way(rank: int) -> None:
    """Let rank 1 end with its batches, and begin a collective of its own."""
    _train_with(rank, None, catches=False)
    dist.all_gather([torch.ones(1)] * 2, torch.ones(1))


class Waited(NamedTuple):
    """What came of ranks that hang, and that are elsewhere."""

    hung: Future[list[Outcome]]
    elsewhere: Future[list[Outcome]]


@pytest.fixture(scope="module", autouse=True)
def waited() -> Iterator[Waited]:
    """Outcomes that take the time-out of a group, which are waited for beside the other tests."""
    with ThreadPoolExecutor(2) as beside:
        elsewhere = beside.submit(together, _goes_its_own_way, patience=SHORT)
        yield Waited(beside.submit(_faulty, _hangs), elsewhere)


def test_a_rank_that_raises_ends_the_others() -> None:
    first, second = _faulty(_raises)
    assert_says(first, LOST)
    note = r"\non rank 1 of 2, in step 7" if hasattr(Exception, "add_note") else ""
    assert_says(second, f"ArithmeticError: a bad batch{note}")


def test_a_rank_that_is_killed_ends_the_others() -> None:
    first, second = _faulty(_is_killed)
    assert_says(first, LOST)
    assert second == Outcome(None, "died")


def test_a_rank_without_further_batches_ends_the_others() -> None:
    first, second = _faulty(None)
    assert_says(first, LOST + r", or has no batch left")
    assert second == Outcome(AT, None)


def test_a_rank_that_catches_an_error_does_not_go_on() -> None:
    first, second = _faulty(_raises, catches=True)
    assert_says(first, LOST)
    assert_says(
        second, r"RuntimeError: rank 1 of 2, step 7: its step 7 failed; a rank that catches"
    )


def _cannot_compile(rank: int) -> None:
    @register_backend(name="flaky")
    def flaky(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        if rank == 1:
            raise OSError("no compiler")
        return graph.forward

    model = _network()
    step = _step(model, compile={"backend": "flaky"})
    step(tk.init_state(model, CONFIG, ADAM), torch.randn(4, 6))


def test_a_rank_without_a_compiler_does_not_run_eager_beside_the_others() -> None:
    first, second = together(_cannot_compile)
    assert_says(first, r"rank 0 of 2 waited in vain for rank 1 in step 0")
    assert_says(second, r"this rank cannot compile train_step: .*OSError: no compiler")


def test_a_rank_that_hangs_ends_the_others_after_the_time_out(waited: Waited) -> None:
    first, second = waited.hung.result()
    assert_says(first, LOST + r".*(Timed out|timeout)")
    assert_says(second, r"rank 1 of 2 waited in vain for rank 0 in step 7")


def test_a_collective_of_the_callers_own_is_not_taken_for_a_step(waited: Waited) -> None:
    first, second = waited.elsewhere.result()
    assert_says(first, LOST + r", or has no batch left.*(Timed out|timeout)")
    assert_says(second, r"(Timed out|timeout|closed)")


def assert_says(outcome: Outcome, pattern: str) -> None:
    assert outcome.error is not None
    with pytest.raises(AssertionError, match=f"(?s){pattern}"):
        raise AssertionError(outcome.error)


# --- faults that the ranks see by comparing ------------------------------------------------


def _held(state: tk.TrainState, name: str, value: Tensor) -> tk.TrainState:
    weights: Any = state.weights
    return state._replace(weights=changed(weights, values={**weights.values, name: value}))


def _flipped(state: tk.TrainState) -> tk.TrainState:
    value = state.weights.values["0.weight"].clone()
    value.view(torch.int32)[3] ^= 1
    return _held(state, "0.weight", value)


def _flipped_in_place(state: tk.TrainState) -> tk.TrainState:
    state.weights.values["2.bias"].view(torch.int32)[1] ^= 1
    return state


def _of_other_sets(state: tk.TrainState) -> tk.TrainState:
    theta = tk.dense_params(state)
    other = tk.init_state({**theta, "0.weight": theta["0.weight"].flip(0)}, CONFIG, ADAM)
    weights: Any = state.weights
    return state._replace(weights=changed(weights, patterns=other.weights.patterns))


def _of_earlier(state: tk.TrainState) -> tk.TrainState:
    return state._replace(step=state.step - 1)


def _refreshed(state: tk.TrainState) -> tk.TrainState:
    return tk.refresh(state._replace(mask_seed=state.mask_seed + 1), RANDOM)


RANDOM = replace(CONFIG, method=tk.random_backward())
CHANGES: dict[str, tuple[Any, int, str]] = {
    "one bit": (_flipped, 2, r"step 2: rank 1 holds another state .*\['0.weight'\] the first"),
    "a bit in place": (_flipped_in_place, 2, r"step 5: rank 1 holds another state .*\['2.bias'\]"),
    "other sets": (_of_other_sets, 3, r"step 3: rank 1 holds another state .*patterns"),
    "another step": (_of_earlier, 3, r"in step [23]: rank 0 is in step 3 and rank 1 is in step 2"),
    "a refresh": (_refreshed, 4, r"step 4: rank 1 holds another state .*mask_seed"),
}


def _error(work: Callable[[], Any]) -> str:
    try:
        work()
    except (RuntimeError, ValueError, TypeError) as reason:
        return f"{type(reason).__name__}: {reason}"
    return "none"


def _change(rank: int, change: Any, at: int) -> None:
    model = _network()
    step, state = _step(model), tk.init_state(model, CONFIG, ADAM)
    for number in range(STEPS):
        if rank == 1 and number == at:
            state = change(state)
        state, _ = step(state, torch.randn(4, 6))


def _rising(step: Tensor) -> Tensor:
    """Return a rate that is another on each rank from some step on."""
    return 0.01 + 0.01 * dist.get_rank() * (step >= 3)


def _rates() -> None:
    model, adam = _network(), tk.adamw(_rising)
    state = tk.init_state(model, CONFIG, adam)
    step = tk.make_train_step(
        model, _loss, CONFIG, adam, compile=False, process_group=dist.group.WORLD
    )
    for _ in range(5):
        state, _ = step(state, torch.ones(4, 6))


def _differ(rank: int) -> dict[str, str]:
    """Return what ranks say that differ in what they are given, by what that is."""
    model, batch = _network(), torch.randn(4, 6)
    other, sgd = replace(CONFIG, penalty_weight=0.1 * rank), [ADAM, tk.sgd(lr=0.1)][rank]
    seeded, wide = _network(seed=rank), _network(width=8 + rank)
    mode, calls = _network().train(rank == 0), dict[str, Callable[[], Any]]()
    start = partial(tk.init_state, config=CONFIG, optimizer=ADAM)
    group = dist.group.WORLD
    storage: Any = ("compact", "dense")[rank]
    calls = {
        "configuration": lambda: _step(model, other),
        "optimiser": lambda: tk.make_train_step(model, _loss, CONFIG, sgd, process_group=group),
        "model": lambda: _step(wide),
        "parts": lambda: _step(nn.Sequential(model, nn.Dropout(0.1 * rank))),
        "engine": lambda: _step(model, engine=("dense", "reference")[rank]),
        "compiled": lambda: _step(model, compile=rank == 0),
        "seed": lambda: _step(seeded)(start(seeded), batch),
        "mode": lambda: _step(mode)(start(mode), batch),
        "storage": lambda: _step(model)(start(model, storage=storage), batch),
        "rate": _rates,
        "no data": lambda: _step(model)(start(model), batch[:0]),
        "samples": lambda: _step(model, samples=lambda b: -1.0)(start(model), batch),
    }
    calls |= {name: partial(call, rank) for name, (call, _) in WRONG.items()}
    found = {name: _error(call) for name, call in calls.items()}
    vars(torch)["__version__"] = ("2.13.0", "2.14.0")[rank]
    return found | {"torch": _error(lambda: _step(model))}


def _of(rank: int, wrong: Any, right: Any) -> Any:
    """Return what is wrong on rank 1 alone."""
    return wrong if rank else right


def _starts(rank: int, **wrong: Any) -> None:
    """Make a step, of arguments of which those of rank 1 are wrong."""
    right = {"model": _network(), "loss_fn": _loss, "config": CONFIG, "optimizer": ADAM}
    group = dist.group.WORLD
    tk.make_train_step(**{**right, **_of(rank, wrong, {})}, process_group=group)


def _saves(rank: int) -> None:
    state = tk.init_state(_network(), CONFIG, ADAM)
    tk.save_sharded(state, "none", keep=_of(rank, 0, 1))


def _synced() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.SyncBatchNorm(8))


WRONG: dict[str, tuple[Callable[[int], Any], str]] = {
    "no engine": (partial(_starts, engine="abacus"), r"ValueError: .*engine must be .*'abacus'"),
    "no optimiser": (partial(_starts, optimizer=torch.optim.SGD), r"TypeError: .*optimizer must"),
    "no configuration": (partial(_starts, config={}), r"TypeError: .*config must be a TopKastCo"),
    "no model": (partial(_starts, model=3), r"TypeError: .*model must be"),
    "no samples": (partial(_starts, samples=3), r"TypeError: .*samples must be a function"),
    "no way to share": (partial(_starts, shard="all"), r"ValueError: .*shard must be 'owners'"),
    "two groups": (partial(_starts, mesh=3), r"ValueError: .*process_group and mesh are both"),
    "synced": (lambda r: _starts(r, model=_synced()), r"ValueError: .*\['1'\] .* SyncBatchNorm"),
    "no number to keep": (_saves, r"ValueError: .*keep must be at least 1"),
    "no path": (
        lambda r: tk.load_sharded(_of(r, 3, "none")),
        r"TypeError: .*folder must be a str or",
    ),
    "nothing to load": (
        lambda r: tk.load_sharded("none", optimizer=_of(r, torch.optim.SGD, None)),
        r"TypeError: .*optimizer must be",
    ),
}
"""Calls of which an argument is wrong on rank 1 alone, and what is said of it."""

CALLS: dict[str, tuple[Callable[[tk.TrainState], Any], str]] = {
    "save_sharded": (lambda state: tk.save_sharded(state, "none"), " at step 0"),
    "async_save_sharded": (lambda state: tk.async_save_sharded(state, "none"), " at step 0"),
    "load_sharded": (lambda state: tk.load_sharded("none"), ""),
    "gather": (tk.gather, " at step 0"),
    "make_train_step": (lambda state: _step(_network()), ""),
}
"""Calls of all ranks, with how errors tell of their step."""


def _elsewhere(rank: int) -> dict[str, str]:
    """Return what ranks say of which one makes a step and the other another call, by that."""
    model, found = _network(), {}
    state = tk.init_state(model, CONFIG, ADAM)
    for name, (call, _) in CALLS.items():
        step = _step(model)
        found[name] = _error(
            partial(call, state) if rank else partial(step, state, torch.ones(4, 6))
        )
    return found


A, B, C = {"a": torch.float32}, {"b": torch.float64}, {"c": torch.float32}
BESIDE: dict[str, tuple[list[dict[str, torch.dtype]], int, str]] = {
    "another number": ([A, A | B], 0, r"in step 0, .* \['a'\] of float32, \['b'\] of float64\. "),
    "another key": (
        [A, {"c": torch.float32}],
        0,
        r"in step 0, .*'a'\] of .* and rank 1 .*'c'\] of",
    ),
    "another order": ([A | B, B | A], 0, r"in step 0, .*'a'.*'b'.* and rank 1 .*'b'.*'a'"),
    "another dtype": (
        [B, {"b": torch.float32}],
        0,
        r"in step 0, .* of float64 .* of float32",
    ),
    "nothing": ([A, {}], 0, r"rank 1 is in step 0, .* no floating 0-d tensor\. "),
    "more in time": (
        [A, A | B],
        3,
        r"rank 0 is in step 4 and .* at the end of step 3, .*'b'",
    ),
    "others in time": ([A, C], 3, r"in step 4 .* the end of step 3, .*'c'.*, and before .*'a'"),
}
"""What ranks return beside the loss, and from which step on; before that as rank 0 does."""


def _beside(rank: int, name: str) -> None:
    told, at, _ = BESIDE[name]
    model, now = _network(), 0

    def loss_fn(apply: Callable[..., Tensor], batch: Tensor) -> Any:
        dtypes = told[rank if now >= at else 0]
        return _loss(apply, batch), {key: torch.ones((), dtype=d) for key, d in dtypes.items()}

    group = dist.group.WORLD
    step = tk.make_train_step(model, loss_fn, CONFIG, ADAM, compile=False, process_group=group)
    state = tk.init_state(model, CONFIG, ADAM)
    for number in range(STEPS):
        now = number
        state, _ = step(state, torch.ones(4, 6))


def _never_refreshed(rank: int) -> None:
    """Train by a configuration that never refreshes, with a bit flipped in place on one rank."""
    model, config = _network(), replace(CONFIG, refresh_every=None)
    step, state = _step(model, config), tk.init_state(model, config, ADAM)
    for number in range(103):
        if rank == 1 and number == 7:
            _flipped_in_place(state)
        state, _ = step(state, torch.ones(4, 6))


def _compare(rank: int) -> dict[str, str]:
    changes = {n: _error(partial(_change, rank, *c[:2])) for n, c in CHANGES.items()}
    beside = {name: _error(partial(_beside, rank, name)) for name in BESIDE}
    changes["without refreshes"] = _error(partial(_never_refreshed, rank))
    return _elsewhere(rank) | beside | _differ(rank) | changes


ALIKE = r"ValueError: ranks must train alike: in make_train_step "
DIFFERENCES = {
    "configuration": ALIKE + r"config of rank 1 is \{'penalty_weight': 0.1\}, rank 0 \{.*: 0.0\}",
    "optimiser": ALIKE + r"optimizer of rank 1 is .*sgd.*, rank 0 .*adamw",
    "model": ALIKE + r"the model of rank 1 is \{'0.weight': \(\(9, 6\), 'torch.float32'\)",
    "parts": ALIKE + r"the parts of the model of rank 1 is .*p=0.1, .* rank 0 .*p=0.0, ",
    "engine": ALIKE + r"engine of rank 1 is 'reference', rank 0 'dense'",
    "compiled": ALIKE + r"compile of rank 1 is False, rank 0 True",
    "torch": ALIKE + r"torch of rank 1 is '2.14.0', rank 0 '2.13.0'",
    "seed": r"step 0: rank 1 holds another state than rank 0, in \d+ of its tensors",
    "mode": r"ranks must train alike: in step 0 modes of rank 1 is \(False, .*, rank 0 \(True",
    "rate": r"train alike: in step 3 learning rate of rank 1 is \[0.0199.*\], rank 0 \[0.0099",
    "storage": r"ranks must train alike: in step 0 (sizes|tensors in the state) of rank 1 is",
    "no data": r"ValueError: rank \d of 2, step 0: the ranks have \[0.0, 0.0\] samples",
    "samples": r"ValueError: rank \d of 2, step 0: the ranks have \[-1.0, -1.0\] samples",
}


@pytest.fixture(scope="module")
def compared() -> list[dict[str, str]]:
    return results(_compare)


ELSEWHERE = {
    name: rf"in .*: rank 0 is in step 0 and rank 1 is in {name.removeprefix('async_')}{at}\. "
    for name, (_, at) in CALLS.items()
}
TOLD = {**ELSEWHERE, **{name: told for name, (*_, told) in (BESIDE | CHANGES).items()}}
TOLD["without refreshes"] = r"step 101: rank 1 holds another state .*\['2.bias'\]"
ALONE = {name: told for name, (_, told) in WRONG.items()}
APART = {name: rf"RuntimeError: rank \d of 2, .*{told}" for name, told in TOLD.items()}
EXPECTED = DIFFERENCES | ALONE | APART


@pytest.mark.parametrize("name", EXPECTED)
def test_ranks_that_differ_all_say_in_what(name: str, compared: list[dict[str, str]]) -> None:
    for rank, found in enumerate(compared):
        assert_says(Outcome(None, found[name]), EXPECTED[name])
        assert "rank" not in EXPECTED[name] or f"rank {rank} of 2" in found[name]
        assert name not in WRONG or rank == 1 or ": rank 1 of 2: " in found[name]
