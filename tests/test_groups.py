"""N:M sets: as many entries in each group, whatever the method, the storage and the loop."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import topkast_func as tk
from tests import reference
from tests.storage import STORAGES
from tests.test_methods import METHODS as OTHERS
from tests.test_methods import batch, mse, network, states
from topkast_func.groups import grouped, ungrouped
from topkast_func.ranking import NaNParameterError, top_sets
from topkast_func.testing import (
    check_counts,
    check_largest,
    check_nested,
    check_outside_untouched,
    patterned,
)
from topkast_func.types import changed

PAPER = tk.topkast("value", exchange=None)
METHODS = OTHERS | {
    "topkast": tk.topkast(exchange=0.2),
    "threshold": tk.topkast("threshold", exchange=0.2),
    "paper": PAPER,
    "random_backward": tk.random_backward(exchange=0.2),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
every_storage = pytest.mark.parametrize("storage", STORAGES)
BASE = tk.TopKastConfig(pattern="1:4", refresh_every=2, penalty_weight=0.01)


def shares(mask: Tensor, group: int) -> set[int]:
    """Return how many entries the groups of a mask have, counted by slices."""
    counts = [mask[:, i : i + group].sum(1) for i in range(0, mask.shape[1], group)]
    return {int(count) for sums in counts for count in sums.flatten()}


def of(state: tk.TrainState) -> list[tk.Masks]:
    return list(tk.masks_of(state).values())


# One choice.


@given(patterned())
@example((torch.zeros(3, 8), tk.TopKastConfig(pattern="2:4", backward_sparsity=0.25)))
def test_sets_equal_the_oracle(drawn: tuple[Tensor, tk.TopKastConfig]) -> None:
    theta, config = drawn
    masks = tk.compute_masks({"weight": theta}, config)["weight"]
    kept, group = map(int, str(config.pattern).split(":"))
    wider = round((1 - config.backward_sparsity) * group)  # type: ignore[operator]
    for mask, share in zip(masks, (kept, wider), strict=True):
        expected = reference.group_mask(theta.double().numpy(), share, group)
        np.testing.assert_array_equal(mask, expected)
    check_largest({"weight": masks}, {"weight": theta}, config)
    check_counts({"weight": masks}, {"weight": theta}, config)


def test_ties_go_in_the_order_of_their_keys_in_the_whole_tensor() -> None:
    """The flat indices 0 to 5 in the order of their keys are 3, 5, 4, 1, 2, 0."""
    config = tk.TopKastConfig(pattern="1:3", backward_sparsity=1 / 3)
    masks = tk.compute_masks({"weight": torch.ones(2, 3)}, config)["weight"]
    assert masks.forward.int().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert masks.backward.int().tolist() == [[0, 1, 1], [1, 0, 1]]


@given(st.integers(2, 40), st.integers(0, 3))
def test_one_group_of_all_is_the_choice_without_groups(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = {"weight": torch.randint(-2, 3, (1, n), generator=generator).float()}
    config = tk.TopKastConfig(pattern=f"{(n + 1) // 2}:{n}", backward_sparsity=0.0)
    plain = tk.TopKastConfig(config.forward_sparsity, 0.0)
    assert torch.equal(
        tk.compute_masks(params, config)["weight"].forward,
        tk.compute_masks(params, plain)["weight"].forward,
    )


def test_groups_of_kernels_are_of_input_channels() -> None:
    theta = torch.randn(6, 8, 3, 2)
    forward = tk.compute_masks({"weight": theta}, BASE)["weight"].forward
    for i, j in np.ndindex(3, 2):
        expected = reference.group_mask(theta[:, :, i, j].contiguous().double().numpy(), 1, 4)
        np.testing.assert_array_equal(forward[:, :, i, j], expected)
    assert forward.is_contiguous()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2, 3)])
@pytest.mark.parametrize("group", [None, 2, 3])
def test_a_tensor_is_that_of_its_groups(shape: tuple[int, ...], group: int | None) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape)
    rows = grouped(tensor, group)
    assert rows.shape[1] == (group or tensor.numel())
    assert torch.equal(ungrouped(rows, shape, group), tensor)


def test_nan_names_the_parameter() -> None:
    theta = torch.randn(4, 8)
    theta[1, 2] = torch.nan
    with pytest.raises(NaNParameterError, match=r"params\['weight'\] holds NaN"):
        tk.compute_masks({"weight": theta}, BASE)


# Every method.


@given(
    st.sampled_from(list(METHODS.values())),
    st.sampled_from(STORAGES),
    st.sampled_from(["2:4", "1:4", "4:8", "2:8", "1:2", "3:3"]),
    st.integers(0, 9),
)
def test_every_refresh_is_exact(method: tk.Method, storage: Any, pattern: str, seed: int) -> None:
    config = tk.TopKastConfig(pattern=pattern, method=method, explore_until=9)
    kept, group = map(int, pattern.split(":"))
    generator = torch.Generator().manual_seed(seed)

    def ties(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    params = {"weight": ties(5, 2 * group), "conv.weight": ties(3, group, 2)}
    state = tk.init_state(params, config, tk.sgd(0.1), storage=storage, seed=seed)
    for step in (3, 6, 9):
        gradients = {name: ties(*theta.shape) for name, theta in params.items()}
        state = tk.refresh(state._replace(step=torch.tensor(step)), config, gradients)
        masks = tk.masks_of(state)
        check_nested(masks, tk.dense_params(state))
        check_counts(masks, params, config, step=step)
        if config.method.sparsifies and step > 5:
            assert all(shares(sets.forward, group) == {kept} for sets in masks.values())
            assert all(len(shares(sets.backward, group)) == 1 for sets in masks.values())


@every_method
@every_storage
def test_training_is_exact_and_nothing_outside_b_moves(method: tk.Method, storage: Any) -> None:
    config = replace(BASE, method=method)
    path = states(config, storage=storage)
    for t, (before, after) in enumerate(pairwise(path)):
        params, masks = tk.dense_params(after), tk.masks_of(after)
        check_nested(masks, params)
        check_counts(masks, params, config, step=t + 1)
        if t % 2 or t == 0:
            check_outside_untouched(before, after)
    if config.method.sparsifies:
        assert all(shares(sets.forward, 4) == {1} for sets in of(path[-1]))


@every_method
def test_storages_agree(method: tk.Method) -> None:
    config = replace(BASE, method=method)
    compact, dense = (states(config, storage=storage)[-1] for storage in STORAGES)
    torch.testing.assert_close(tk.forward_params(compact), tk.forward_params(dense))
    torch.testing.assert_close(tk.dense_params(compact), tk.dense_params(dense))


@pytest.mark.parametrize(
    ("method", "storage"),
    [(PAPER, "compact"), (tk.random_backward(), "dense"), (tk.rigl(0.4), "compact")],
)
def test_compiled_equals_eager(method: tk.Method, storage: Any) -> None:
    torch.compiler.reset()
    config = replace(BASE, method=method, penalty=None)
    backend = {"backend": "aot_eager"}
    eager, compiled = (states(config, 5, how, storage) for how in (False, backend))
    if config.method.explores:
        theta, moved = (tk.dense_params(state) for state in eager[:2])
        for name, masks in tk.masks_of(eager[0]).items():
            exploring = masks.backward & ~masks.forward
            assert (theta[name] != moved[name])[exploring].float().mean() > 0.9
    torch.testing.assert_close(tk.dense_params(compiled[-1]), tk.dense_params(eager[-1]))
    for ours, theirs in zip(of(compiled[-1]), of(eager[-1]), strict=True):
        assert torch.equal(ours.forward, theirs.forward)


@every_method
def test_a_resumed_run_equals_the_uninterrupted_one(method: tk.Method, tmp_path: Any) -> None:
    config = replace(BASE, method=method)
    path = states(config)
    tk.save(path[3], tmp_path / "state", config)
    assert tk.load_config(tmp_path / "state") == config
    state = tk.load(tmp_path / "state")
    step = tk.make_train_step(network(), mse, config, tk.sgd(0.1, momentum=0.9), compile=False)
    for seed in range(3, 7):
        state, _ = step(state, batch(seed))
    torch.testing.assert_close(tk.dense_params(state), tk.dense_params(path[-1]), rtol=0, atol=0)


def test_what_stays_is_the_largest_of_the_tensor_and_groups_are_filled_beside_it() -> None:
    config = replace(BASE, pattern="2:4", forward_sparsity=None, method=tk.topkast("value", 0.25))
    state = tk.init_state({"weight": torch.randn(10, 16)}, config, tk.sgd(0.1), storage="dense")
    old = tk.masks_of(state)["weight"].forward
    other = torch.randn(10, 16)
    moved = state._replace(weights=changed(state.weights, theta={"weight": other}))
    theta = tk.dense_params(moved)["weight"].double().numpy()
    places = [int(i) for i in old.flatten().nonzero()]
    stay = np.zeros(theta.shape, bool)
    stay.flat[reference.ranked(theta, places)[: len(places) - round(0.25 * len(places))]] = True
    expected = reference.group_mask(np.where(stay, 1e9, theta), 2, 4)
    new = tk.masks_of(tk.refresh(moved, config))["weight"].forward
    np.testing.assert_array_equal(new, expected)
    assert 0 < int((old & ~new).sum()) <= round(0.25 * len(places))


def test_rigl_fills_each_group_by_its_largest_gradients() -> None:
    config = replace(BASE, pattern="2:4", forward_sparsity=None, method=tk.rigl(0.5))
    theta, gradient = torch.randn(10, 16), torch.randn(10, 16)
    state = tk.init_state({"weight": theta}, config, tk.sgd(0.1))
    old = tk.masks_of(state)["weight"].forward
    places = [int(i) for i in old.flatten().nonzero()]
    stay = np.zeros(theta.shape, bool)
    stay.flat[reference.ranked(theta.double().numpy(), places)[: len(places) // 2]] = True
    scores = np.where(stay, np.inf, gradient.abs().double().numpy())
    new = tk.masks_of(tk.refresh(state, config, {"weight": gradient}))["weight"].forward
    np.testing.assert_array_equal(new, reference.group_mask(scores, 2, 4))
    assert (new & ~old).any()


def test_what_is_drawn_depends_on_the_seed_and_set_keeps_the_largest() -> None:
    params = {"weight": torch.randn(20, 32)}
    static = replace(BASE, method=tk.static())
    drawn = [tk.compute_masks(params, static, seed=s)["weight"].forward for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    places = drawn[0].nonzero()[:, 1].remainder(4).bincount(minlength=4)
    assert int(places.min()) > 20  # of 160 in four places
    config = replace(BASE, method=tk.set(0.5))
    state = tk.init_state(params, config, tk.sgd(0.1))
    old, new = (tk.masks_of(s)["weight"].forward for s in (state, tk.refresh(state, config)))
    size = params["weight"].abs()
    largest = old & (size > size[old].median())
    assert bool((new & largest).eq(largest).all())
    assert 0 < int((old & ~new).sum()) <= 80


def test_pruning_goes_through_whole_numbers_of_each_group() -> None:
    config = replace(BASE, method=tk.gmp(1, 5, stages=4))
    path = [{share for sets in of(s) for share in shares(sets.forward, 4)} for s in states(config)]
    assert path[0] == {4}
    assert path[-1] == {1}
    assert all(len(share) == 1 for share in path)
    assert {2, 3} & {n for share in path for n in share}


@every_storage
def test_powers_of_weights_are_grouped_too(storage: Any) -> None:
    config = replace(BASE, powerprop=2.0)
    state = states(config, storage=storage)[-1]
    check_counts(tk.masks_of(state), tk.dense_params(state), config)


class Careless(tk.Method):
    """Chooses the largest of the tensor."""

    def sets(self, situation: Any) -> Any:
        asked = (situation.forward, situation.backward)
        return top_sets(situation.name, situation.scores, *asked)


def test_a_method_that_does_not_know_of_groups_is_named() -> None:
    config = replace(BASE, method=Careless())
    with pytest.raises(ValueError, match=r"Careless.*as many entries in each group of 4, and has"):
        tk.compute_masks({"weight": torch.arange(32.0).view(4, 8)}, config)


# Ordinary loops, and what is made of a state.


@pytest.mark.parametrize("method", ["topkast", "random_backward", "ste", "static", "set", "gmp"])
def test_an_ordinary_loop_trains_as_train_step(method: str) -> None:
    config = replace(BASE, method=METHODS[method], refresh_every=2)
    expected = states(config, 5)[-1]
    model = network()
    handle = tk.sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(5):
        optimizer.zero_grad()
        (mse(model, batch(seed)) + handle.penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        handle.step()
    for name, sets in handle.masks().items():
        assert torch.equal(sets.forward, tk.masks_of(expected)[name].forward)
        assert torch.equal(sets.backward, tk.masks_of(expected)[name].backward)
    alpha = tk.forward_params(expected)
    torch.testing.assert_close(dict(tk.densify(model).named_parameters()), alpha)


def test_sets_of_a_checkpoint_with_torn_groups_are_refused() -> None:
    config = tk.TopKastConfig(pattern="2:4")
    model, other = network(), network()
    tk.sparsify(model, config)
    tk.sparsify(other, tk.TopKastConfig(0.5, 0.0))
    with pytest.raises(RuntimeError, match="A outside B, or groups of 4 that differ, this layer"):
        model.load_state_dict(other.state_dict())
    again = network()
    handle = tk.sparsify(again, config)
    again.load_state_dict(model.state_dict())
    assert all(shares(sets.forward, 4) == {2} for sets in handle.masks().values())


def test_a_model_for_inference_computes_with_the_sets() -> None:
    state, (x, _) = states(BASE)[-1], batch(0)
    model = network()
    model.load_state_dict(tk.forward_params(state))
    torch.testing.assert_close(tk.sparse_module(state, network())(x), model(x))


# What fits, and what does not.


def test_sparsities_follow_from_the_pattern() -> None:
    config = tk.TopKastConfig(pattern="2:4")
    assert (config.forward_sparsity, config.sparsities(0)) == (0.5, (0.5, 0.0))
    assert config == tk.TopKastConfig(0.5, pattern="02:4")
    assert tk.TopKastConfig(pattern="1:4").sparsities(0) == (0.75, 0.5)
    assert tk.TopKastConfig(pattern="1:3", backward_sparsity={"*": 1 / 3}).group == 3
    assert tk.TopKastConfig({"*": 0.5}, {"*": 0.25}, pattern="2:4").pattern == "2:4"
    assert tk.TopKastConfig().forward_sparsity == 0.9
    assert tk.TopKastConfig(pattern="2:4", backward_sparsity=0.3, method=tk.ste()).group == 4
    assert tk.TopKastConfig.from_json(config.to_json()) == config
    assert tk.TopKastConfig.from_json('{"pattern": "2:8"}').forward_sparsity == 0.75


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pattern": (2, 4)}, TypeError, r"pattern must be a string such as '2:4', got \(2, 4\)"),
    ({"pattern": "2/4"}, ValueError, r"pattern must be 'N:M', 1 ≤ N ≤ M and M ≥ 2.*'2/4'"),
    ({"pattern": "5:4"}, ValueError, "pattern must be .* got '5:4'"),
    ({"pattern": "0:4"}, ValueError, "pattern must be .* got '0:4'"),
    ({"pattern": "1:1"}, ValueError, "pattern must be .* got '1:1'"),
    (
        {"pattern": "2:4", "block_shape": (2, 2)},
        ValueError,
        r"pattern='2:4' chooses single entries, block_shape=\(2, 2\) whole blocks",
    ),
    (
        {"pattern": "2:4", "allocation": "erk"},
        ValueError,
        "pattern='2:4' gives every weight one density: allocation must be 'uniform', got 'erk'",
    ),
    ({"pattern": "2:4", "allocation": {"a": 0.5}}, ValueError, "allocation must be 'uniform'"),
    (
        {"pattern": "2:4", "forward_sparsity": 0.9},
        ValueError,
        "forward_sparsity must be 0.5, as pattern='2:4' asks for, or be left out .* got 0.9",
    ),
    ({"pattern": "2:4", "forward_sparsity": {"a": 0.5, "b": 0.75}}, ValueError, "got 0.75"),
    (
        {"pattern": "1:2", "forward_sparsity": tk.staged({0: 0.0, 5: 0.5})},
        ValueError,
        "forward_sparsity must be 0.5, .* got 0.0",
    ),
    (
        {"pattern": "2:4", "backward_sparsity": 0.3},
        ValueError,
        "backward_sparsity must be 1 − K/4 for a whole K, .* pattern='2:4' asks for, got 0.3",
    ),
    ({"pattern": "2:4", "backward_sparsity": 0.75}, ValueError, "backward_sparsity must be in"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD)
def test_what_contradicts_a_pattern_is_named(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tk.TopKastConfig(**fields)


def test_weights_that_groups_do_not_divide_stay_dense_and_are_told() -> None:
    params = {"a.weight": torch.randn(4, 6), "b.weight": torch.randn(4, 8)}
    state = tk.init_state(params, BASE, tk.sgd(0.1))
    assert list(tk.masks_of(state)) == ["b.weight"]
    assert "pattern='1:4' does not divide it" in tk.summary(state, config=BASE).notes[0]
    asked = replace(BASE, sparse="a.*")
    with pytest.raises(ValueError, match=r"pattern='1:4' does not divide params\['a.weight'\]"):
        tk.init_state(params, asked, tk.sgd(0.1))
    with pytest.raises(ValueError, match=r"does not divide params\['bias'\] of shape \(8,\)"):
        tk.compute_masks({"bias": torch.randn(8)}, replace(BASE, sparse="bias"))


@every_storage
def test_a_state_without_groups_is_refused_until_it_is_refreshed(storage: Any) -> None:
    plain = tk.TopKastConfig(0.75, 0.5, refresh_every=None)
    config = replace(plain, pattern="1:4")
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, plain, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    with pytest.raises(ValueError, match=r"not as many in each group, as pattern='1:4' asks for"):
        train_step(state, batch(0))
    after, _ = train_step(tk.refresh(state, config), batch(0))
    assert all(shares(sets.forward, 4) == {1} for sets in of(after))
    refused: list[Callable[[], object]] = [
        lambda: tk.init_state(model, config, optimizer, masks=tk.masks_of(state)),
        lambda: tk.sparsify(copy.deepcopy(model), config, masks=tk.masks_of(state)),
    ]
    for start in refused:
        with pytest.raises(ValueError, match="not as many in each group"):
            start()
    given = tk.masks_of(tk.refresh(state, config))
    assert tk.init_state(model, config, optimizer, masks=given).weights.sizes()


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.sparsifies], ids=str)
def test_any_method_can_go_on_from_sets_without_groups(method: tk.Method) -> None:
    plain = tk.TopKastConfig(0.75, 0.5, method=PAPER)
    state = tk.init_state(network(), plain, tk.sgd(0.1))
    config = replace(plain, pattern="1:4", method=method)
    gradients = {name: torch.randn_like(t) for name, t in tk.dense_params(state).items()}
    state = tk.refresh(state._replace(step=torch.tensor(8)), config, gradients)
    assert all(shares(sets.forward, 4) == {1} for sets in of(state))


def test_the_checks_find_torn_groups() -> None:
    params = {"weight": torch.arange(1.0, 17.0).view(2, 8)}
    config = tk.TopKastConfig(pattern="2:4", backward_sparsity=0.5)
    masks = tk.compute_masks(params, config)
    check_largest(masks, params, config)
    torn = masks["weight"].forward.clone()
    torn[0, 0], torn[1, 7] = True, False
    wrong = {"weight": tk.Masks(torn, torn)}
    with pytest.raises(AssertionError, match="weight: groups of 4 have different numbers"):
        check_counts(wrong, params, config)
    torn[0, 2], torn[1, 7] = False, True
    check_counts(wrong, params, config)
    with pytest.raises(AssertionError, match="an entry is in and one that ranks before it is not"):
        check_largest(wrong, params, config)
