"""Optimisers of one's own, and what is asked of all."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import topkast_func as tk
from tests.own_optimizers import factored, normalized
from tests.small_runs import drawn, mse, network, run, same
from tests.storage import STORAGES
from topkast_func.training.optim.transformation import slot_problem, wide
from topkast_func.types import Params

Tree = dict[str, Tensor]

CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=2)
OWN = {"0-d": normalized(0.02), "(1,)": normalized(0.02, (1,)), "rows": factored(0.02)}
CASES = [
    ("0-d", "compact"),
    ("0-d", "dense"),
    ("(1,)", "compact"),
    ("(1,)", "dense"),
    ("rows", "dense"),
]
every_case = pytest.mark.parametrize(("name", "storage"), CASES)


@every_case
def test_slots_of_other_shapes_stay_as_they_are_at_a_refresh(name: str, storage: Any) -> None:
    before = run(CONFIG, OWN[name], drawn(2), storage)[-1]
    after = tk.refresh(before, CONFIG)
    assert not same(tk.masks_of(before), tk.masks_of(after))
    assert all(slot.all() for tree in before.optimizer.slots.values() for slot in tree.values())
    assert same(after.optimizer, before.optimizer)


@every_case
def test_a_run_with_them_goes_on_from_a_file_bit_for_bit(
    name: str, storage: Any, tmp_path: Path
) -> None:
    whole = run(CONFIG, OWN[name], drawn(6), storage)
    tk.save(whole[3], tmp_path / "state")
    loaded = tk.load(tmp_path / "state", CONFIG, network(), OWN[name])
    assert same(loaded.optimizer, whole[3].optimizer)
    assert same(run(CONFIG, OWN[name], drawn(6)[3:], storage, start=loaded)[-1], whole[-1])


@every_case
def test_compiled_with_them_equals_eager(name: str, storage: Any) -> None:
    eager = run(CONFIG, OWN[name], drawn(5), storage)
    compiled = run(CONFIG, OWN[name], drawn(5), storage, {"backend": "aot_eager"})
    for one, other in zip(eager, compiled, strict=True):
        assert_close(tk.dense_params(one), tk.dense_params(other))
        assert_close(one.optimizer, other.optimizer)
    for before, after in itertools.pairwise(compiled):
        for weight, masks in tk.masks_of(after).items():
            old, new = tk.dense_params(before)[weight], tk.dense_params(after)[weight]
            assert torch.equal(old[~masks.backward], new[~masks.backward])
            assert (old != new)[masks.backward & ~masks.forward].any()


def test_calls_for_an_update_are_counted_by_any_integer() -> None:
    plain = tk.multi_steps(tk.sgd(0.1), 2)
    counted = replace(plain, every=np.int64(2))
    assert same(*(run(CONFIG, each, drawn(4))[-1] for each in (plain, counted)))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_both_storages_keep_the_same_number_of_a_parameter(shape: tuple[int, ...]) -> None:
    compact, dense = (
        run(CONFIG, normalized(0.02, shape), drawn(5), storage)[-1] for storage in STORAGES
    )
    for kept, other in zip(
        compact.optimizer.slots["largest"].values(),
        dense.optimizer.slots["largest"].values(),
        strict=True,
    ):
        assert kept.shape == shape
        assert_close(kept, other)


def test_slots_of_any_dtype_follow_their_weights() -> None:
    """An int8 stays one; what newly enters B starts at zero."""
    optimizer = tk.sgd(0.5, momentum=0.9)
    for storage in STORAGES:
        state = run(CONFIG, optimizer, drawn(2), storage)[-1]
        moments = state.optimizer.slots["sgd.momentum"]
        counts = {name: slot.ne(0).to(torch.int8) for name, slot in moments.items()}
        counted = state._replace(optimizer=state.optimizer._replace(slots={"age": counts}))
        after = tk.refresh(counted, CONFIG).optimizer.slots["age"]
        entered = 0
        for name, masks in tk.masks_of(state).items():
            now = tk.masks_of(tk.refresh(counted, CONFIG))[name]
            stays = int((masks.backward & now.backward).sum())
            assert after[name].dtype == torch.int8
            assert int(after[name].sum()) == stays
            entered += int(now.backward.sum()) - stays
        assert entered > 0


# --- who sees the shape of a weight ----------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        factored(0.1),
        tk.multi_steps(factored(0.1), 2),
        tk.chain(tk.clip_by_global_norm(1.0), factored(0.1)),
        tk.partition({"*bias": tk.sgd(0.1), "*": factored(0.1)}),
    ],
)
def test_an_optimizer_that_needs_shapes_is_refused_by_name_in_compact_storage(
    optimizer: tk.Optimizer,
) -> None:
    assert "factored(lr=0.1)" in repr(optimizer)
    message = re.escape(f"{optimizer} may need the shapes of weights") + ".*storage='dense'"
    with pytest.raises(ValueError, match=message):
        tk.init_state(network(), CONFIG, optimizer)
    state = tk.init_state(network(), CONFIG, optimizer, storage="dense")
    assert state.optimizer.slots["row"]["0.weight"].shape == (8,)
    assert state.optimizer.slots["column"]["0.weight"].shape == (6,)


def test_factored_moments_are_those_of_the_paper() -> None:
    """Shazeer and Stern (2018), algorithm 1: R and C of the squares, R C over the sum of R."""
    optimizer = factored(0.5, decay=0.0)
    gradient = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.5, 4.0]], dtype=torch.float64)
    theta = {"w": torch.zeros(2, 3, dtype=torch.float64)}
    state = optimizer.init(theta)
    updates, state = optimizer.update({"w": gradient}, state, theta, torch.tensor(0.5))
    square = gradient.square()
    moment = square.sum(1, keepdim=True) * square.sum(0) / square.sum()
    assert_close(updates["w"], -0.5 * gradient / moment.sqrt())


# --- what an optimiser makes of parameters ---------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_updates_are_computed_in_float32_at_the_least(
    dtype: torch.dtype, computed: torch.dtype
) -> None:
    tensor = torch.ones(2, dtype=dtype)
    assert wide(tensor).dtype == computed
    assert (wide(tensor) is tensor) == (dtype == computed)


VALUES = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        (tk.adam(), tk.adamw(), "slots are ['adam.exp_avg', 'adam.exp_avg_sq'], those of adamw("),
        (tk.adamw(), tk.multi_steps(tk.adamw(), 2), "'multi_steps(2).gradient'"),
        (
            tk.multi_steps(tk.adamw(), 2),
            tk.multi_steps(tk.adamw(), 3),
            "slots are ['adamw.exp_avg', 'adamw.exp_avg_sq', 'multi_steps(2).gradient'], those of",
        ),
        (
            tk.lion(),
            tk.partition({"b": tk.sgd(0.1), "*": tk.lion()}),
            "slots 'lion.exp_avg' are of ['a', 'b'], those of partition(",
        ),
        (
            normalized(0.1),
            normalized(0.1, (1,)),
            "slot 'largest' of 'a' has shape () and torch.float64, those of normalized(",
        ),
    ],
)
def test_slots_of_another_optimizer_are_told(
    made: tk.Optimizer, asked: tk.Optimizer, message: str
) -> None:
    problem = slot_problem(made.init(VALUES).slots, VALUES, asked)
    assert message in str(problem)
    assert slot_problem(made.init(VALUES).slots, VALUES, made) is None


def test_slots_of_another_shape_or_dtype_are_told() -> None:
    slots = tk.lion().init(VALUES).slots
    for other in (torch.zeros(5), torch.zeros(4, dtype=torch.float16)):
        tree = {"lion.exp_avg": {**slots["lion.exp_avg"], "b": other}}
        assert "slot 'lion.exp_avg' of 'b' has shape" in str(slot_problem(tree, VALUES, tk.lion()))


def test_an_optimizer_without_a_name_prints_its_kind() -> None:
    nameless = tk.Optimizer(tk.sgd(0.1).init, tk.sgd(0.1).update, tk.sgd(0.1).learning_rate)
    assert repr(nameless) == "Optimizer(...)"
    assert nameless != tk.sgd(0.1)


def test_an_optimizer_that_reads_values_to_make_its_slots_is_told() -> None:
    def init(params: Params) -> tk.OptimizerState:
        scales = {name: torch.tensor(float(p.norm())) for name, p in params.items()}
        return tk.OptimizerState(torch.zeros((), dtype=torch.int64), {"scale": scales})

    like = tk.sgd(0.1)
    reads = tk.Optimizer(init, like.update, like.learning_rate, elementwise=True, name="reads")
    state = tk.init_state(network(), CONFIG, reads)
    train_step = tk.make_train_step(network(), mse, CONFIG, reads, compile=False)
    with pytest.raises(TypeError, match=r"init of reads must make its slots by the shapes and dty"):
        train_step(state, drawn(1)[0])
