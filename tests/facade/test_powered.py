"""Powerpropagation in ordinary loops: φ stands in the parameter."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import topkast_func as tk
from topkast_func.powerprop import phi_of, theta_of

CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=3, powerprop=2.0, penalty_weight=1e-2)


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(16, n, generator=generator).double() for n in (8, 4))
    return inputs, targets


def train(model: nn.Module, handle: tk.Sparsifier, steps: range, forward: Any = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in steps:
        inputs, targets = batch(seed)
        loss = mse_loss((forward or model)(inputs), targets) + handle.penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        handle.step()


@pytest.mark.parametrize("engine", ["dense", "numba"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": tk.topkast("value", exchange=None)},
        {"method": tk.ste()},
        {"method": tk.set()},
        {"block_shape": (2, 2)},
    ],
)
def test_an_ordinary_loop_trains_as_train_step(engine: Any, more: dict[str, Any]) -> None:
    config, model = replace(CONFIG, **more), network()
    state = tk.init_state(model, config, tk.sgd(0.1))
    loss_fn = lambda apply, batch: mse_loss(apply(batch[0]), batch[1])  # noqa: E731
    step = tk.make_train_step(network(), loss_fn, config, tk.sgd(0.1), compile=False)
    handle = tk.sparsify(model, config, engine=engine)
    start = copy.deepcopy(model.state_dict())
    for seed in range(8):
        state, _ = step(state, batch(seed))
    train(model, handle, range(8))
    for name, masks in handle.masks().items():
        assert torch.equal(masks.forward, tk.masks_of(state)[name].forward)
        assert not torch.equal(model.state_dict()[name], start[name])
    trained = tk.densify(model).state_dict()
    torch.testing.assert_close(trained, tk.forward_params(state))


@pytest.mark.parametrize("engine", ["dense", "numba"])
def test_a_compiled_forward_pass_trains_as_an_eager_one(engine: Any) -> None:
    trained = []
    for backend in (None, "aot_eager"):
        model = network()
        handle = tk.sparsify(model, CONFIG, engine=engine)
        inside = handle.masks()["0.weight"]
        compiled = torch.compile(model, backend=backend, fullgraph=True) if backend else model
        compiled(batch(0)[0]).square().sum().backward()
        gradient = model[0]._parameters["weight"].grad
        assert gradient[inside.backward & ~inside.forward].any()
        assert not gradient[~inside.backward].any()
        train(model, handle, range(5), compiled)
        trained.append(model.state_dict())
    torch.testing.assert_close(*trained)


def test_what_lies_outside_b_stays_and_phi_is_what_the_parameter_holds() -> None:
    model = network()
    theta = model[0].weight.detach().clone()
    handle = tk.sparsify(model, replace(CONFIG, refresh_every=None))
    phi = model[0].weight.detach().clone()
    torch.testing.assert_close(phi, phi_of(theta, 2.0))
    forward, backward = handle.masks()["0.weight"]
    train(model, handle, range(3))
    assert torch.equal(model[0].weight[~backward], phi[~backward])
    alpha = torch.where(forward, theta_of(model[0].weight, 2.0), 0.0)
    torch.testing.assert_close(tk.densify(model)[0].weight, alpha)


@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
def test_a_plain_checkpoint_holds_theta_and_a_sparse_one_phi(block_shape: Any) -> None:
    config = replace(CONFIG, block_shape=block_shape)
    trained: Any = network()
    plain: Any = network()
    with torch.no_grad():
        plain[0].weight.copy_(torch.randn(12, 8).double())
    handle = tk.sparsify(trained, config)
    trained.load_state_dict(plain.state_dict())
    torch.testing.assert_close(theta_of(trained[0].weight, 2.0), plain[0].weight)
    chosen = tk.compute_masks(dict(plain.named_parameters()), config)
    assert torch.equal(handle.masks()["0.weight"].forward, chosen["0.weight"].forward)
    other = network()
    tk.sparsify(other, config)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other[0].weight, trained[0].weight)


@pytest.mark.parametrize(("saved", "own"), [(2.0, 1.0), (1.0, 2.0), (2.0, 3.0)])
def test_a_state_dict_of_another_exponent_is_refused(saved: float, own: float) -> None:
    theirs, model = network(), network()
    handle = tk.sparsify(theirs, replace(CONFIG, powerprop=saved))
    ours = tk.sparsify(model, replace(CONFIG, powerprop=own))
    before = copy.deepcopy(model.state_dict())
    told = f"of powerprop={saved}, that of this layer of powerprop={own}"
    with pytest.raises(RuntimeError, match=told):
        model.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=f"a run of powerprop={saved}, this is of {own}"):
        ours.load_state_dict(handle.state_dict())
    for name, tensor in model.state_dict().items():
        if name.startswith(("0.weight", "2.weight")):
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert ours.steps == 0


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("saved", "own"), [(2.0, 2.0), (2.0, 1.0), (1.0, 2.0), (2.0, 3.0)])
def test_a_state_dict_without_its_sets_is_taken_for_what_it_tells(
    saved: float, own: float, assign: bool
) -> None:
    theirs, model = network(), network()
    handle = tk.sparsify(theirs, replace(CONFIG, powerprop=saved))
    train(theirs, handle, range(2))
    state = theirs.state_dict()
    for name in [name for name in state if name.endswith("_sets")]:
        del state[name]
    before = {name: tensor.clone() for name, tensor in state.items()}
    ours = tk.sparsify(model, replace(CONFIG, powerprop=own))
    model.load_state_dict(state, assign=assign)
    torch.testing.assert_close(ours.dense_params(), handle.dense_params())
    torch.testing.assert_close(dict(state), before, rtol=0, atol=0)
    if saved == own:
        assert torch.equal(model[0].weight, theirs[0].weight)
    chosen = tk.compute_masks(handle.dense_params(), ours.config)
    assert torch.equal(ours.masks()["0.weight"].forward, chosen["0.weight"].forward)


def test_of_a_layer_each_weight_is_taken_for_what_is_told_of_it() -> None:
    theirs, model = (nn.LSTM(4, 5).double() for _ in range(2))
    config = replace(CONFIG, sparse="weight_ih_l0")
    handle = tk.sparsify(theirs, config)
    state = theirs.state_dict()
    del state["weight_ih_l0_sets"]
    ours = tk.sparsify(model, replace(config, sparse="weight_*"))
    model.load_state_dict(state)
    torch.testing.assert_close(ours.dense_params(), handle.dense_params())


def test_tied_weights_become_phi_once() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    model[1].weight = model[0].weight
    theta = model[0].weight.detach().clone()
    tk.sparsify(model, CONFIG)
    torch.testing.assert_close(model[1].weight, phi_of(theta, 2.0))
    x = batch(0)[0]
    expected = model(x)
    torch.testing.assert_close(tk.densify(model)(x), expected)


def test_a_part_of_a_model_is_not_densified_under_the_layer_it_is_tied_to() -> None:
    model: Any = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)]).double()
    model[1].weight = model[0][0].weight
    handle = tk.sparsify(model, CONFIG)
    x = batch(0)[0]
    expected, before = [part(x) for part in model], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"\['0.weight'\] are tied to .* has all of these layers"):
        tk.densify(model[0])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    handle.refresh()
    torch.testing.assert_close([part(x) for part in model], expected, rtol=0, atol=0)
    copied = copy.deepcopy(model[0])
    torch.testing.assert_close(tk.densify(copied)(x), expected[0])
    torch.testing.assert_close([part(x) for part in tk.densify(model)], expected)


def test_a_state_dict_that_is_assigned_keeps_its_tensors() -> None:
    model: Any = network()
    plain: Any = network()
    tk.sparsify(model, CONFIG)
    before = plain[0].weight.detach().clone()
    model.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(plain[0].weight, before)
    torch.testing.assert_close(theta_of(model[0].weight, 2.0), before)


def test_a_weight_of_zeros_is_refused_and_the_others_stay() -> None:
    model = network()
    nn.init.zeros_(model[2].weight)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"params\['2.weight'\] is zero everywhere"):
        tk.sparsify(model, CONFIG)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    tk.sparsify(model, replace(CONFIG, keep_dense="2.weight"))
    zeros = copy.copy(before)  # with its metadata
    zeros.update((n, torch.zeros_like(v)) for n, v in before.items())
    with pytest.raises(RuntimeError, match="is zero everywhere"):
        model.load_state_dict(zeros)


def test_a_state_dict_that_does_not_tell_theta_from_phi_is_named() -> None:
    theirs, model, plain = network(), network(), network()
    tk.sparsify(theirs, CONFIG)
    ours = tk.sparsify(model, CONFIG)
    model.load_state_dict(dict(theirs.state_dict()))  # its sets tell
    assert torch.equal(model[0].weight, theirs[0].weight)
    stripped = {n: v for n, v in theirs.state_dict().items() if not n.endswith("_sets")}
    for state in (stripped, dict(plain.state_dict())):
        with pytest.warns(UserWarning, match=r"not tell .* θ or φ of powerprop=2.0: .*_sets"):
            model.load_state_dict(state)
    torch.testing.assert_close(ours.dense_params()["0.weight"], plain[0].weight.detach())
    model.load_state_dict(plain.state_dict())
