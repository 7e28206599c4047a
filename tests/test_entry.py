"""What newly enters A starts as the method says, and no more than a share of A is exchanged."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import topkast_func as tk
from tests.test_methods import batch, mse, network, states
from topkast_func.entry import entered
from topkast_func.filling import exchanged_sets
from topkast_func.powerprop import phi_of, theta_of
from topkast_func.testing import check_counts, check_nested, check_outside_untouched

PAPER = tk.topkast("value", exchange=None)
BASE = tk.TopKastConfig(0.75, 0.5, refresh_every=2, penalty=None, method=PAPER)
FORMS = {
    "zero": tk.topkast(exchange=None),
    "threshold": tk.topkast("threshold", exchange=None),
    "exchange": tk.topkast("value", exchange=0.2),
    "zero, exchange": tk.topkast(entry="zero", exchange=0.2),
    "random, zero": tk.random_backward(entry="zero", exchange=0.2),
}
every_form = pytest.mark.parametrize("method", FORMS.values(), ids=FORMS.keys())
every_storage = pytest.mark.parametrize("storage", ["compact", "dense"])
BLOCKS = [(1, 1), (2, 2)]


def drifted(config: tk.TopKastConfig, storage: Any = "compact") -> tk.TrainState:
    """Return a state whose B∖A has grown, so that much of it wants to enter A."""
    model, optimizer = network(), tk.adamw(0.1)
    config = replace(config, refresh_every=None)
    state = tk.init_state(model, config, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    for seed in range(10):
        state, _ = train_step(state, batch(seed))
    return state


@every_form
@every_storage
@pytest.mark.parametrize("block", BLOCKS)
def test_counts_are_exact_and_nothing_outside_b_moves(
    method: tk.Method, storage: str, block: Any
) -> None:
    config = replace(BASE, method=method, block_shape=block)
    path = states(config, 7, storage=storage)
    for t, (before, after) in enumerate(pairwise(path)):
        params, masks = tk.dense_params(after), tk.masks_of(after)
        check_nested(masks, params)
        check_counts(masks, params, config, step=t)
        if t % 2 or t == 0:
            check_outside_untouched(before, after)


@every_form
def test_storages_agree(method: tk.Method) -> None:
    compact, dense = (
        states(replace(BASE, method=method), 7, storage=s) for s in ("compact", "dense")
    )
    theta, other = tk.dense_params(compact[-1]), tk.dense_params(dense[-1])
    for name in theta:
        torch.testing.assert_close(theta[name], other[name])


@pytest.mark.parametrize(
    ("form", "storage"),
    [("zero, exchange", "compact"), ("random, zero", "compact"), ("threshold", "dense")],
)
def test_compiled_equals_eager(form: str, storage: str) -> None:
    method = FORMS[form]
    config = replace(BASE, method=method)
    eager = states(config, 5, storage=storage)
    compiled = states(config, 5, storage=storage, compile={"backend": "aot_eager"})
    masks = tk.masks_of(eager[0])["0.weight"]
    exploring = masks.backward & ~masks.forward
    moved = tk.dense_params(eager[1])["0.weight"] - tk.dense_params(eager[0])["0.weight"]
    assert moved[exploring].count_nonzero() > 0
    for name, theta in tk.dense_params(eager[-1]).items():
        torch.testing.assert_close(tk.dense_params(compiled[-1])[name], theta)


@every_storage
@pytest.mark.parametrize("block", BLOCKS)
def test_the_entry_from_zero_changes_alpha_only_where_a_weight_leaves(
    storage: str, block: Any
) -> None:
    config = replace(BASE, method=tk.topkast(exchange=None), block_shape=block)
    before = drifted(config, storage)
    after = tk.refresh(before, config)
    for name, new in tk.masks_of(after).items():
        old = tk.masks_of(before)[name]
        came = new.forward & ~old.forward
        assert came.any()
        old_alpha, alpha = tk.forward_params(before)[name], tk.forward_params(after)[name]
        assert torch.equal(alpha, torch.where(new.forward, old_alpha, 0.0))
        theta = tk.dense_params(before)[name]
        assert torch.equal(tk.dense_params(after)[name], torch.where(came, 0.0, theta))


def test_the_sets_do_not_depend_on_the_entry() -> None:
    before = drifted(BASE)
    for entry in ("zero", "threshold"):
        config = replace(BASE, method=tk.topkast(entry, exchange=None))
        for name, masks in tk.masks_of(tk.refresh(before, config)).items():
            for mask, other in zip(masks, tk.masks_of(tk.refresh(before, BASE))[name], strict=True):
                assert torch.equal(mask, other)


def norms(theta: Tensor, block: tuple[int, int], norm: Any) -> Tensor:
    rows, columns = block
    cut = theta.view(theta.shape[0] // rows, rows, theta.shape[1] // columns, columns)
    return torch.linalg.vector_norm(cut, 2 if norm == "l2" else 1, dim=(1, 3))


@pytest.mark.parametrize(("block", "norm"), [((1, 1), "l2"), ((2, 2), "l2"), ((2, 2), "l1")])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_threshold_is_the_smallest_magnitude_that_stays(
    block: Any, norm: Any, exponent: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    grids = torch.rand(2, 8 // block[0], 8 // block[1], generator=generator) < 0.5
    old, new = (g.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1) for g in grids)
    found = entered(
        "theta",
        phi_of(theta, exponent),
        tk.Masks(old, old),
        tk.Masks(new, new),
        "threshold",
        block_shape=block,
        block_norm=norm,
        exponent=exponent,
    )
    result = theta_of(found, exponent)
    before, after = norms(theta, block, norm), norms(result, block, norm)
    stays, came = grids[0] & grids[1], grids[1] & ~grids[0]
    torch.testing.assert_close(after[came], before[came].clamp(max=float(before[stays].min())))
    assert (after[came] < before[came]).any()
    assert torch.equal(found[~(new & ~old)], phi_of(theta, exponent)[~(new & ~old)])
    torch.testing.assert_close(result.sign(), theta.sign())


def test_from_zero_is_from_the_threshold_under_powerpropagation() -> None:
    forms = [replace(BASE, method=m, powerprop=2.0) for m in (FORMS["zero"], FORMS["threshold"])]
    before = drifted(forms[0])
    zero, threshold = (tk.refresh(before, config) for config in forms)
    for name, theta in tk.dense_params(zero).items():
        assert torch.equal(theta, tk.dense_params(threshold)[name])
        if name in tk.masks_of(zero):
            assert theta[tk.masks_of(zero)[name].forward].all()


def test_zeros_that_enter_at_the_threshold_stay_zero() -> None:
    old, new = torch.tensor([[True, False]]), torch.tensor([[True, True]])
    theta = torch.zeros(1, 2)
    found = entered("theta", theta, tk.Masks(old, old), tk.Masks(new, new), "threshold")
    assert torch.equal(found, theta)


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            st.lists(st.floats(-4, 4, width=32), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
            st.integers(1, n),
            st.integers(1, n),
        )
    ),
    st.floats(0.01, 1.0),
)
def test_at_most_a_share_of_a_is_exchanged(case: Any, fraction: float) -> None:
    numbers, active, *sizes = case
    scores, old = torch.tensor(numbers), torch.tensor(active)
    forward, backward = sorted(sizes)
    held = int(old.sum())
    new, wider = exchanged_sets("theta", scores, old, held, forward, backward, fraction)
    keep = min(held, forward)
    stay = max(0, keep - max(1, math.floor(fraction * keep + 0.5)))
    assert (int(new.sum()), int(wider.sum())) == (forward, backward)
    assert not (new & ~wider).any()
    assert int((new & old).sum()) >= stay
    magnitudes = scores.abs()
    if stay > 0:
        lowest_kept = magnitudes[old].sort(descending=True).values[stay - 1]
        assert new[old & (magnitudes > lowest_kept)].all()
    free = ~new & ~(old & (magnitudes >= (lowest_kept if stay > 0 else torch.inf)))
    joined = new & ~old
    if joined.any() and free.any():
        assert magnitudes[joined].min() >= magnitudes[free].max()


def test_without_a_bound_the_exchange_is_that_of_the_paper() -> None:
    whole = replace(BASE, method=tk.topkast("value", exchange=1.0))
    before = drifted(BASE)
    for name, masks in tk.masks_of(tk.refresh(before, whole)).items():
        for mask, other in zip(masks, tk.masks_of(tk.refresh(before, BASE))[name], strict=True):
            assert torch.equal(mask, other)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"entry": "old"}, ValueError),
        ({"exchange": 0.0}, ValueError),
        ({"exchange": 1.5}, ValueError),
        ({"exchange": "all"}, TypeError),
        ({"exchange": float("nan")}, ValueError),
    ],
)
@pytest.mark.parametrize("make", [tk.topkast, tk.random_backward])
def test_an_option_out_of_range_is_refused(make: Any, options: Any, error: Any) -> None:
    with pytest.raises(error, match=next(iter(options))):
        make(**options)


def test_nan_keeps_the_sets_and_warns() -> None:
    config = replace(BASE, method=FORMS["zero, exchange"], refresh_every=1)
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    x, y = batch(0)
    state, _ = train_step(state, (x, y * torch.nan))
    with pytest.warns(UserWarning, match=r"no refresh before step 1.*NaN"):
        train_step(state, (x, y))
