"""What a state, its sets and its configuration must agree in."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import topkast_func as tk
from tests.storage import STORAGES
from tests.test_methods import batch, mse, network
from topkast_func.training import agreement

CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2)
WEIGHTS = ("0.weight", "2.weight")


def given(**changes: Any) -> dict[str, tk.Masks]:
    """Return sets of the sizes that `CONFIG` asks for, which magnitude would not choose."""
    sets = {}
    for name, weight in network().named_parameters():
        if name in WEIGHTS:
            rank = torch.arange(weight.numel()).view(weight.shape)
            sets[name] = tk.Masks(rank < weight.numel() // 4, rank < weight.numel() // 2)
    return sets | changes


@pytest.mark.parametrize("storage", STORAGES)
def test_training_starts_from_the_sets_that_are_given(storage: Any) -> None:
    model, optimizer, masks = network(), tk.sgd(0.1), given()
    state = tk.init_state(model, CONFIG, optimizer, storage=storage, masks=masks)
    for name, found in tk.masks_of(state).items():
        for mask, expected in zip(found, masks[name], strict=True):
            assert torch.equal(mask, expected)
            assert mask.data_ptr() != expected.data_ptr()
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    after, _ = train_step(state, batch(0))
    moved = tk.dense_params(after)["0.weight"] != tk.dense_params(state)["0.weight"]
    assert moved.any()
    assert not (moved & ~masks["0.weight"].backward).any()


def test_a_ticket_of_sizes_of_its_own_is_given_by_its_densities() -> None:
    ticket = torch.zeros(12, 8, dtype=torch.bool)
    ticket[0] = True
    config = replace(
        CONFIG,
        method=tk.static(),
        sparse="0.weight",
        allocation={"0.weight": float(ticket.float().mean())},
    )
    masks = {"0.weight": tk.Masks(ticket, ticket)}
    state = tk.init_state(network(), config, tk.sgd(0.1), masks=masks)
    kept = tk.masks_of(tk.refresh(state._replace(step=torch.tensor(2)), config))
    assert torch.equal(kept["0.weight"].forward, ticket)


def bad() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    first = given()["0.weight"]
    return {
        "missing": ({"0.weight": first}, ValueError, r"missing \['2.weight'\], unknown \[\]"),
        "unknown": (given(x=first), ValueError, r"missing \[\], unknown \['x'\]"),
        "shape": (
            given(**{"0.weight": tk.Masks(first.forward[:4], first.backward[:4])}),
            ValueError,
            r"masks\['0.weight'\] has shape \(4, 8\), the parameter \(12, 8\)",
        ),
        "type": (given(**{"0.weight": first.forward}), TypeError, r"must be Masks"),
        "dtype": (
            given(**{"0.weight": tk.Masks(first.forward.float(), first.backward)}),
            TypeError,
            "must be of torch.bool",
        ),
        "order": (
            given(**{"0.weight": tk.Masks(first.forward.flip(0), first.backward)}),
            ValueError,
            "the forward mask is not part of the backward mask",
        ),
        "counts": (
            given(**{"0.weight": tk.Masks(first.backward, first.backward)}),
            ValueError,
            r"masks\['0.weight'\] have \(48, 48\) entries .* asks for \(24, 48\)",
        ),
    }


@pytest.mark.parametrize("case", bad().values(), ids=bad().keys())
def test_sets_that_do_not_fit_are_refused(case: Any) -> None:
    masks, error, message = case
    with pytest.raises(error, match=message):
        tk.init_state(network(), CONFIG, tk.sgd(0.1), masks=masks)


def test_sets_without_names_or_values_are_refused() -> None:
    with pytest.raises(TypeError, match="masks must map names to Masks, got list"):
        tk.init_state(network(), CONFIG, tk.sgd(0.1), masks=[*given().values()])  # type: ignore[arg-type]
    absent = {n: tk.Masks(*(m.to("meta") for m in sets)) for n, sets in given().items()}
    with pytest.raises(ValueError, match=r"masks\['0.weight'\].* on the meta device"):
        tk.init_state(network(), CONFIG, tk.sgd(0.1), masks=absent)


def test_sets_that_are_not_of_blocks_are_refused() -> None:
    config = replace(CONFIG, block_shape=(2, 2))
    masks = given(**{"0.weight": tk.Masks(*(m.flip(0) for m in given()["0.weight"]))})
    masks["2.weight"] = tk.Masks(*(m.roll(1) for m in masks["2.weight"]))
    with pytest.raises(ValueError, match=r"are not made of blocks of \(2, 2\)"):
        tk.init_state(network(), config, tk.sgd(0.1), masks=masks)


def test_sets_are_drawn_by_a_seed_of_their_own() -> None:
    config = replace(CONFIG, method=tk.random_backward())

    def sets(**seeds: Any) -> torch.Tensor:
        state = tk.init_state(network(), config, tk.sgd(0.1), **seeds)
        return tk.masks_of(tk.refresh(state, config))["0.weight"].backward

    assert torch.equal(sets(seed=1, mask_seed=5), sets(seed=2, mask_seed=5))
    assert not torch.equal(sets(seed=1, mask_seed=5), sets(seed=1, mask_seed=6))
    assert torch.equal(sets(seed=3), sets(seed=3, mask_seed=3))


def step_of(config: tk.TopKastConfig, state: tk.TrainState) -> None:
    tk.make_train_step(network(), mse, config, tk.sgd(0.1), compile=False)(state, batch(0))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "other",
    [
        {"forward_sparsity": 0.5},
        {"backward_sparsity": 0.25},
        {"forward_sparsity": tk.staged({0: 0.6, 9: 0.75})},
        {"allocation": {"0.weight": 0.4}},
    ],
)
def test_a_step_refuses_a_state_of_other_sparsities(storage: Any, other: dict[str, Any]) -> None:
    config = replace(CONFIG, **other)
    state = tk.init_state(network(), CONFIG, tk.sgd(0.1), storage=storage)
    with pytest.raises(ValueError, match=r"has \(24, 48\) .* asks for .* at step 0.*refresh"):
        step_of(config, state)
    step_of(config, tk.refresh(state, config))


def test_a_step_refuses_other_sets_in_mid_run_too() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    state, _ = train_step(tk.init_state(model, CONFIG, optimizer), batch(0))
    other = tk.refresh(state, replace(CONFIG, forward_sparsity=0.5))
    train_step(state, batch(1))
    with pytest.raises(ValueError, match="asks for"):
        train_step(other, batch(1))


@pytest.mark.parametrize("blocks", [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (4, 2))])
def test_blocks_of_another_shape_are_refused(blocks: Any) -> None:
    first, second = (replace(CONFIG, block_shape=shape) for shape in blocks)
    state = tk.init_state(network(), first, tk.sgd(0.1))
    for refused in (step_of, lambda config, state: tk.refresh(state, config)):
        message = rf"in blocks of \({blocks[0][0]}, .* asks for \({blocks[1][0]}, .*init_state"
        with pytest.raises(ValueError, match=message):
            refused(second, state)


@pytest.mark.parametrize("storage", STORAGES)
def test_sets_fit_through_stages_refreshes_and_the_end_of_exploration(storage: Any) -> None:
    config = replace(
        CONFIG, forward_sparsity=tk.staged({0: 0.6, 3: 0.75}), explore_until=6, allocation="erk"
    )
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer, storage=storage)
    for seed in range(9):
        step = tk.make_train_step(model, mse, config, optimizer, compile=False)
        state, _ = step(state, batch(seed))


ROWWISE = replace(tk.sgd(0.1), elementwise=False, name="by_rows")


@pytest.mark.parametrize(
    ("made", "other", "message"),
    [
        ({}, {"optimizer": tk.adamw(0.1)}, r"optimiser: slots are \['adam.exp.*adamw\("),
        ({}, {"optimizer": ROWWISE}, r"optimiser: by_rows may need the shapes .* storage='dense'"),
        ({}, {"config": replace(CONFIG, sparse="0.weight")}, r"unknown \['2.weight'\]"),
        ({}, {"config": replace(CONFIG, keep_dense="0.weight")}, r"unknown \['0.weight'\]"),
        ({}, {"config": replace(CONFIG, sparse=lambda n, p: n == "0.weight")}, r"unknown \['2.w"),
        ({}, {"config": replace(CONFIG, powerprop=2.0)}, r"powerprop is 1.0, .* asks for 2.0"),
        ({}, {"config": replace(CONFIG, method=tk.dense())}, r"Dense\(\) chooses no sets"),
        (
            {},
            {"model": network().double()},
            r"model: '0.weight' has dtype torch.float32, the",
        ),
        (
            {},
            {"model": nn.Sequential(nn.Linear(8, 12), nn.Tanh())},
            r"model: of the parameters missing \[\], unknown \['2.bias'",
        ),
        (
            {"storage": "dense"},
            {"config": replace(CONFIG, block_shape=(2, 2))},
            r"the sets of '0.weight' are not made of blocks of \(2, 2\).* init_state",
        ),
    ],
)
def test_a_step_names_what_a_state_is_not_of(
    made: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"model": network(), "config": CONFIG, "optimizer": tk.adam(0.1)}
    state = tk.init_state(network(), CONFIG, given["optimizer"], **made)
    for changes, error in (({}, nullcontext()), (other, pytest.raises(ValueError, match=message))):
        asked = given | changes
        train_step = tk.make_train_step(
            asked["model"], mse, asked["config"], asked["optimizer"], compile=False
        )
        with error:
            train_step(state, batch(0))


def test_slots_of_another_shape_or_dtype_are_refused_in_mid_run_too() -> None:
    model, optimizer = network(), tk.sgd(0.1, momentum=0.9)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    state, _ = train_step(tk.init_state(model, CONFIG, optimizer), batch(0))
    slots = state.optimizer.slots["sgd.momentum"]
    for wrong in (slots["0.bias"].double(), slots["0.bias"][1:]):
        changed = state.optimizer._replace(slots={"sgd.momentum": slots | {"0.bias": wrong}})
        with pytest.raises(ValueError, match=r"slot 'sgd.momentum' of '0.bias' has shape"):
            train_step(state._replace(optimizer=changed), batch(1))
    train_step(state, batch(1))


def test_what_agreed_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Mock(side_effect=agreement.disagreements)
    monkeypatch.setattr(agreement, "disagreements", look)
    config, model, optimizer = replace(CONFIG, refresh_every=4), network(), tk.adam(0.1)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    state = tk.init_state(model, config, optimizer)
    for seed in range(12):
        state, _ = train_step(state, batch(seed))
    assert look.call_count == 1


OF_EQUAL_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "groups": ({"pattern": "1:4"}, {"forward_sparsity": 0.75, "backward_sparsity": 0.5}),
    "other sparsities": ({"forward_sparsity": 0.5}, {"forward_sparsity": 0.9}),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", OF_EQUAL_SIZES)
def test_a_step_that_has_agreed_refuses_what_it_would_have_refused_at_first(
    kind: str, storage: Any
) -> None:
    """Sets are known by their tensors: not by their sizes, nor by where those are in memory."""
    own, other = (tk.TopKastConfig(**fields) for fields in OF_EQUAL_SIZES[kind])
    model, optimizer = nn.Linear(16, 16), tk.sgd(0.1)
    loss, x = lambda apply, x: (apply(x) ** 2).mean(), torch.randn(4, 16)
    for seed in range(9):
        train_step = tk.make_train_step(model, loss, own, optimizer, compile=False)
        state = tk.init_state(model, own, optimizer, storage=storage, seed=seed)
        train_step(state, x)
        del state
        state = tk.init_state(model, other, optimizer, storage=storage)
        with pytest.raises(ValueError, match="the state is of another configuration"):
            train_step(state, x)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_refuses_a_wider_b_in_mid_run(storage: Any) -> None:
    config, optimizer, model = tk.TopKastConfig(0.75, 0.5), tk.sgd(0.1), nn.Linear(16, 16)
    loss, x = lambda apply, x: (apply(x) ** 2).mean(), torch.randn(4, 16)
    train_step = tk.make_train_step(model, loss, config, optimizer, compile=False)
    state, _ = train_step(tk.init_state(model, config, optimizer, storage=storage), x)
    wider = tk.init_state(
        tk.dense_params(state), replace(config, backward_sparsity=0.25), optimizer, storage=storage
    )
    damaged = state._replace(weights=wider.weights)
    with pytest.raises(ValueError, match=r"of another configuration|not whole"):
        train_step(damaged, x)
    train_step(state, x)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_refuses_what_explores_when_that_is_over(storage: Any) -> None:
    config = tk.TopKastConfig(0.75, 0.5, explore_until=3)
    optimizer, model = tk.sgd(0.1), nn.Linear(16, 16)
    loss, x = lambda apply, x: (apply(x) ** 2).mean(), torch.randn(4, 16)
    train_step = tk.make_train_step(model, loss, config, optimizer, compile=False)
    start = state = tk.init_state(model, config, optimizer, storage=storage)
    for _ in range(5):
        state, _ = train_step(state, x)
    with pytest.raises(ValueError, match=r"'weight' has .* entries in A and B"):
        train_step(start._replace(step=state.step, optimizer=state.optimizer), x)


@pytest.mark.parametrize("wanted", [{"forward_sparsity": 0.75}, {"pattern": "2:4"}], ids=str)
def test_other_sets_than_those_that_stay_have_a_way_on(wanted: Any) -> None:
    model, optimizer, x = nn.Linear(8, 8), tk.sgd(0.1), torch.randn(3, 8)
    config = tk.TopKastConfig(0.5, 0.5)
    state = tk.init_state(model, config, optimizer)._replace(step=torch.tensor(4))
    for until, way_on in ((2, r"from explore_until=2 on sets stay"), (9, None)):
        other = tk.TopKastConfig(**wanted, explore_until=until)
        refreshed = tk.refresh(state, other)
        train_step = tk.make_train_step(
            model, lambda apply, x: (apply(x) ** 2).mean(), other, optimizer, compile=False
        )
        with pytest.raises(ValueError, match=way_on) if way_on else nullcontext():
            train_step(refreshed, x)


def test_states_that_take_turns_are_looked_at_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Mock(side_effect=agreement.disagreements)
    monkeypatch.setattr(agreement, "disagreements", look)
    config, model, optimizer = replace(CONFIG, refresh_every=3), network(), tk.adam(0.1)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    states = [tk.init_state(network(), config, optimizer) for _ in range(3)]
    for seed in range(8):
        states = [train_step(state, batch(seed))[0] for state in states]
    assert look.call_count == 3


@pytest.mark.parametrize("storage", STORAGES)
def test_a_refresh_refuses_other_sparse_parameters(storage: Any) -> None:
    state = tk.init_state(network(), CONFIG, tk.sgd(0.1), storage=storage)
    for fields, message in (
        ({"sparse": "0.weight"}, r"of the sparse parameters missing \[\], unknown \['2.weight'\]"),
        ({"sparse": "*"}, r"missing \['0.bias', '2.bias'\], unknown \[\]"),
        ({"block_shape": (2, 2)}, r"blocks of \("),
    ):
        with pytest.raises(ValueError, match=message):
            tk.refresh(state, replace(CONFIG, **fields))


def test_masks_and_names_of_nothing_are_told() -> None:
    params = dict(network().named_parameters())
    with pytest.raises(ValueError, match=r"masks of unknown parameters: \['x'\]"):
        tk.exploration_penalty(params, {"x": given()["0.weight"]}, CONFIG)
    with pytest.raises(TypeError, match=r"params must map names to tensors, got the names \[3\]"):
        tk.compute_masks({3: params["0.weight"]}, CONFIG)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="model must be a Module, got int"):
        tk.densify(1)  # type: ignore[type-var]


def test_gradients_that_a_method_does_not_read_are_passed_over() -> None:
    state = tk.init_state(network(), CONFIG, tk.sgd(0.1))
    found = tk.masks_of(tk.refresh(state, CONFIG, {}))
    expected = tk.masks_of(tk.refresh(state, CONFIG, {"x": torch.ones(2)}))
    assert torch.equal(found["0.weight"].backward, expected["0.weight"].backward)


class Twice(nn.Module):
    """Has one layer under two names, in which functional_call leaves its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.first(x))


def test_parameters_that_are_none_any_more_are_named() -> None:
    model, config, optimizer = Twice(), tk.TopKastConfig(0.5), tk.sgd(0.1)
    state, x = tk.init_state(model, config, optimizer), torch.ones(2, 8)

    def loss(apply: Any, x: torch.Tensor) -> torch.Tensor:
        return apply(x).sum()

    train_step = tk.make_train_step(model, loss, config, optimizer, compile=False)
    state, _ = train_step(state, x)
    torch.func.functional_call(model, tk.forward_params(state), x)
    assert not isinstance(model.first.weight, nn.Parameter)
    for use in (
        lambda: train_step(state, x),
        lambda: tk.init_state(model, config, optimizer),
        lambda: tk.sparse_module(state, model),
        lambda: tk.index_masks(model, tk.masks_of(state)),
    ):
        with pytest.raises(
            ValueError, match=r"'first\.weight' of the model is an nn.Parameter no more"
        ):
            use()
