"""The seed's training loop: what it trains, measures, keeps and refuses."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from topkast_func import TopKastConfig, TopKastLinear, TopKastLoss, TopKastTrainer, sparsify
from topkast_func.data import BostonHousing, boston_dataset

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "momentum": partial(SGD, lr=0.02, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.02),
    "adamw": partial(torch.optim.AdamW, lr=0.02),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
}


def _net() -> nn.Sequential:
    return nn.Sequential(
        TopKastLinear(4, 16, 0.5, 0.2),
        nn.ReLU(),
        TopKastLinear(16, 1, p_forward=0.5, p_backward=0.2),
    )


def _data(n: int = 40) -> TensorDataset:
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(features, features.sum(1) + features[:, 0].square())


def _trainer(net: nn.Module, **options: Any) -> TopKastTrainer:
    defaults: dict[str, Any] = {
        "loss": nn.MSELoss(),
        "num_epochs": 4,
        "batch_size": 8,
        "optimizer": SGD(net.parameters(), lr=0.02),
        "data": _data(),
        "device": "cpu",
    }
    return TopKastTrainer(net, **{**defaults, **options})


def _sparse(net: nn.Module) -> list[TopKastLinear]:
    return [module for module in net.modules() if isinstance(module, TopKastLinear)]


def _alpha(layer: TopKastLinear) -> Tensor:
    return torch.where(layer.masks.forward, layer.weight.detach(), 0.0)


def _pair(data: "Dataset[Any] | Subset[Any]") -> tuple[Tensor, Tensor]:
    samples = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def _mse(net: nn.Module, data: "Dataset[Any] | Subset[Any]", dense: bool = False) -> float:
    """Oracle: the network of `_net` at α, or at all of θ, written out."""
    first, last = _sparse(net)
    features, target = _pair(data)
    weights = [layer.weight if dense else _alpha(layer) for layer in (first, last)]
    hidden = linear(features, weights[0], first.bias).relu()
    return mse_loss(linear(hidden, weights[1], last.bias).squeeze(1), target).item()


def _climb_after(steps: int, optimizer: Optimizer, factor: float = -1.0) -> Optimizer:
    """Turn descent into ascent, so that the best epoch is not the last."""
    counter = count(1)

    def hook(optimizer: Optimizer, *_: Any) -> None:
        if next(counter) == steps:
            for group in optimizer.param_groups:
                group["lr"] *= factor

    optimizer.register_step_post_hook(hook)
    return optimizer


def _refreshes(monkeypatch: pytest.MonkeyPatch, trainer: TopKastTrainer) -> list[int]:
    """Note the epoch of every choice of sets."""
    epochs: list[int] = []
    choose = TopKastLinear.update_active_param_set

    def noting(layer: TopKastLinear) -> None:
        epochs.append(len(trainer.losses_train))
        choose(layer)

    monkeypatch.setattr(TopKastLinear, "update_active_param_set", noting)
    return epochs


def test_arguments_are_the_seeds_and_callbacks_by_name() -> None:
    parameters = [*inspect.signature(TopKastTrainer).parameters.values()]
    assert [(p.name, p.default) for p in parameters] == [
        ("net", inspect.Parameter.empty),
        ("loss", inspect.Parameter.empty),
        ("num_epochs", 50),
        ("print_info_every", 10),
        ("print_loss_history", False),
        ("num_epochs_explore", None),
        ("update_every", None),
        ("batch_size", None),
        ("train_val_test_split", (0.7, 0.2, 0.1)),
        ("patience", None),
        ("optimizer", None),
        ("seed", 42),
        ("data", None),
        ("device", None),
        ("callbacks", ()),
    ]
    assert parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY


# --- training ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optimizer_built_before_training_trains_through_refreshes(
    make: Callable[[Iterable[Tensor]], Optimizer],
) -> None:
    net = _net()
    optimizer = make(net.parameters())
    before = [layer.weight.clone() for layer in _sparse(net)]
    sets = [torch.stack(layer.idx_bwd) for layer in _sparse(net)]
    trainer = _trainer(net, optimizer=optimizer, num_epochs=12, num_epochs_explore=12)
    trainer.train()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, net.parameters(), strict=True))
    assert trainer.losses_train[-1] < 0.5 * trainer.losses_train[0]
    assert trainer.best_loss < 0.5 * trainer.losses_validation[0]
    after = _sparse(net)
    assert any(not torch.equal(torch.stack(b.idx_bwd), a) for a, b in zip(sets, after, strict=True))
    assert all(not torch.equal(b.weight, a) for a, b in zip(before, after, strict=True))


def test_lbfgs_trains_through_refreshes() -> None:
    net = _net()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4)
    options = {"batch_size": 100, "num_epochs": 15, "num_epochs_explore": 15}
    trainer = _trainer(net, optimizer=optimizer, **options)
    trainer.train()
    assert trainer.losses_train[-1] < 0.5 * trainer.losses_train[0]


def test_defect_01_sparse_weights_are_trained() -> None:
    net = _net()
    loss = TopKastLoss(loss=nn.MSELoss, net=net, alpha=0.4)
    optimizer = SGD(net.parameters(), lr=1e-5)  # net, loss, optimiser, trainer: the seed's order
    trainer = _trainer(net, loss=loss, optimizer=optimizer, num_epochs=3, num_epochs_explore=3)
    before = [layer.weight.clone() for layer in _sparse(net)]
    trainer.train()
    for layer, start in zip(_sparse(net), before, strict=True):
        assert (layer.weight != start)[layer.idx_fwd].float().mean() > 0.5


def test_defect_07_nested_layers_are_refreshed() -> None:
    layer = TopKastLinear(4, 3, 0.5, 0.25)
    net = nn.Sequential(nn.ModuleDict({"body": nn.Sequential(nn.Identity(), layer)})["body"])
    layer.weight = layer.weight.abs().max() - layer.weight.abs()
    old, due = torch.stack(layer.idx_fwd), torch.stack(layer.compute_mask(layer.weight, 0.5))
    data = TensorDataset(torch.randn(20, 4), torch.randn(20, 3))
    _trainer(net, optimizer=SGD(net.parameters(), lr=0.0), num_epochs=1, data=data).train()
    assert not torch.equal(old, due)
    assert torch.equal(torch.stack(layer.idx_fwd), due)


def test_a_layer_that_is_the_whole_net_is_trained() -> None:
    layer = TopKastLinear(4, 1, 0.5, 0.0)
    trainer = _trainer(layer, optimizer=_climb_after(8, SGD(layer.parameters(), lr=0.02)))
    trainer.train()
    assert 0 < trainer.best_epoch < 3
    assert trainer.eval(trainer.validation_dataset) == pytest.approx(trainer.best_loss)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_epochs_explore": 2, "update_every": 100}, [0, 1]),
        ({"num_epochs_explore": 2, "update_every": 4}, [0, 1, 4, 8]),
        ({"num_epochs_explore": 0, "update_every": 5}, [0, 5]),
        ({}, [0, 2, 4, 6, 8]),  # a tenth of ten epochs, then every fifth of them
    ],
)
def test_defect_12_sets_are_chosen_in_so_many_epochs_and_no_more(
    options: dict[str, int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(TopKastLinear(4, 1, 0.5, 0.0), num_epochs=10, **options)
    epochs = _refreshes(monkeypatch, trainer)
    trainer.train()
    assert epochs == expected


def test_a_class_of_losses_is_called_without_arguments() -> None:
    net = _net()
    found = _trainer(net, loss=nn.MSELoss)
    assert isinstance(found.loss, nn.MSELoss)
    assert found.eval() == _trainer(net).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_goes_on_where_gradients_are_switched_off(mode: Callable[[], Any]) -> None:
    net, data = _net(), _data()
    expected = _trainer(copy.deepcopy(net), num_epochs=2)
    expected.optimizer = SGD(expected.net.parameters(), lr=0.02)
    expected.train()
    with mode():
        trainer = _trainer(net, num_epochs=2, data=tuple(2 * part / 2 for part in data.tensors))
        trainer.train()
        assert trainer.eval() == expected.eval()
        assert not any(parameter.is_inference() for parameter in net.parameters())
    assert np.array_equal(trainer.losses_train, expected.losses_train)
    assert np.array_equal(trainer.losses_validation, expected.losses_validation)


def test_a_net_is_moved_outside_of_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    net, modes = _net(), []
    monkeypatch.setattr(net, "to", lambda _: modes.append(torch.is_inference_mode_enabled()))
    with torch.inference_mode():
        _trainer(net)
    assert modes == [False]


def test_a_net_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        net = _net()
    with pytest.raises(
        ValueError, match=r"'0\.weight' of net was made under torch\.inference_mode"
    ):
        _trainer(net)


def test_slots_follow_their_weight_in_the_trainer() -> None:
    net = TopKastLinear(4, 8, 0.5, 0.25)
    data = TensorDataset(torch.randn(20, 4), torch.randn(20, 8))
    optimizer = SGD(net.parameters(), lr=0.2, momentum=0.9)
    trainer = _trainer(net, optimizer=optimizer, data=data, num_epochs=6, num_epochs_explore=6)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(*_: Any) -> None:
        assert net.weight.grad is not None
        momentum = optimizer.state[net.weight]["momentum_buffer"]
        seen.append((net.masks.backward, momentum.clone(), net.weight.grad.clone()))

    optimizer.register_step_post_hook(note)
    trainer.optimizer = _climb_after(5, optimizer)
    trainer.train()
    for (old, before, _), (new, after, gradient) in pairwise(seen):
        kept = torch.where(old, before, 0.0)
        torch.testing.assert_close(after[new], (0.9 * kept + gradient)[new])
    assert len({tuple(inside.flatten().tolist()) for inside, *_ in seen}) > 2
    last = seen[-1][0]
    assert not torch.equal(last, net.masks.backward)  # the best network's B is another
    slot = optimizer.state[net.weight]["momentum_buffer"]
    assert torch.equal(slot, torch.where(last, seen[-1][1], 0.0))


def test_classification_targets_stay_class_indices() -> None:
    features = torch.randn(60, 4)
    data = TensorDataset(features, (features[:, 0] > 0).long() + (features[:, 1] > 0).long())
    net = nn.Sequential(TopKastLinear(4, 16, 0.5, 0.2), nn.ReLU(), TopKastLinear(16, 3, 0.5, 0.2))
    loss = TopKastLoss(nn.CrossEntropyLoss, net, alpha=0.001)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    trainer = _trainer(net, loss=loss, data=data, optimizer=optimizer, num_epochs=20)
    trainer.train()
    assert trainer.losses_train[-1] < 0.5 * trainer.losses_train[0]
    predicted = trainer.predict(features).argmax(1)
    assert (predicted == data[:][1]).float().mean() > 0.8


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_targets_of_as_many_entries_take_shape_and_dtype_of_the_output(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    features, target = torch.randn(20, 4).double(), torch.arange(20).view(shape).to(dtype)
    net = TopKastLinear(4, 1, 0.5, 0.0)
    trainer = _trainer(net, optimizer=SGD(net.parameters(), lr=0.0), num_epochs=1)
    expected = mse_loss(net(features.float()).squeeze(1), torch.arange(20.0)).item()
    assert trainer.eval((features, target)) == pytest.approx(expected)


# --- what is measured ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, 27, 100])
def test_defect_11_training_loss_is_the_mean_over_the_observations(batch_size: int) -> None:
    net = _net()
    loss = TopKastLoss(nn.MSELoss, net, alpha=1)  # the penalty is not part of what is reported
    optimizer = SGD(net.parameters(), lr=0.0)
    trainer = _trainer(net, loss=loss, optimizer=optimizer, num_epochs=2, batch_size=batch_size)
    trainer.train()
    train, validation = _mse(net, trainer.train_dataset), _mse(net, trainer.validation_dataset)
    np.testing.assert_allclose(trainer.losses_train, [train, train], rtol=1e-5)  # float32 sums
    np.testing.assert_allclose(trainer.losses_validation, [validation] * 2, rtol=1e-5)


def test_defect_03_validation_and_eval_measure_the_network_that_is_trained() -> None:
    net = _net()
    trainer = _trainer(net, loss=TopKastLoss(nn.MSELoss, net, alpha=0.4))
    trainer.train()
    assert trainer.best_loss == pytest.approx(_mse(net, trainer.validation_dataset))
    assert trainer.best_loss != pytest.approx(_mse(net, trainer.validation_dataset, dense=True))
    assert trainer.eval() == pytest.approx(_mse(net, trainer.test_dataset))
    assert trainer.eval() != pytest.approx(_mse(net, trainer.test_dataset, dense=True))


def test_defect_10_eval_takes_a_pair_or_a_data_set() -> None:
    net = _net()
    trainer, data = _trainer(net), _data(13)
    expected = pytest.approx(_mse(net, data))
    assert trainer.eval(data) == expected
    assert trainer.eval(_pair(data)) == expected
    assert trainer.eval(test_data=data) == trainer.test_loss == expected
    assert trainer.eval() == trainer.eval(trainer.test_dataset)


def test_predict_runs_alpha_in_evaluation_mode_without_gradient() -> None:
    net = nn.Sequential(nn.Dropout(0.9), TopKastLinear(4, 3, 0.5, 0.2), nn.Dropout(0.9))
    trainer, inputs = _trainer(net), torch.randn(2, 5, 4)
    net.train()
    layer = _sparse(net)[0]
    found = trainer.predict(inputs.double())
    assert net.training
    assert net[0].training
    assert not found.requires_grad
    torch.testing.assert_close(found, linear(inputs, _alpha(layer), layer.bias))


@pytest.mark.parametrize("use", ["train", "eval", "predict"])
def test_the_random_numbers_of_torch_are_left_alone(use: str) -> None:
    trainer = _trainer(_net(), num_epochs=1)
    uses: dict[str, Callable[[], Any]] = {
        "train": trainer.train,
        "eval": trainer.eval,
        "predict": lambda: trainer.predict(torch.ones(3, 4)),
    }
    before = torch.get_rng_state()
    uses[use]()
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_statistics_are_learnt_in_training_and_used_in_validation() -> None:
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(norm, TopKastLinear(4, 1, 0.5, 0.2))
    trainer = _trainer(net, optimizer=SGD(net.parameters(), lr=0.0), num_epochs=2, batch_size=14)
    net.eval()
    trainer.train()
    assert norm.num_batches_tracked == 2
    features, target = _pair(trainer.validation_dataset)
    expected = mse_loss(net.eval()(features).squeeze(1), target).item()
    assert trainer.losses_validation[0] == pytest.approx(expected)


# --- the best network ----------------------------------------------------------------------


def test_defect_06_the_best_network_is_a_copy_and_is_what_remains() -> None:
    net = _net()
    parameters = list(net.parameters())
    optimizer = _climb_after(12, SGD(net.parameters(), lr=0.05))
    trainer = _trainer(net, optimizer=optimizer, num_epochs=6, num_epochs_explore=6)
    trainer.train()
    assert 0 < trainer.best_epoch < 5
    assert trainer.best_loss == min(trainer.losses_validation) < trainer.losses_validation[-1]
    assert trainer.losses_validation[trainer.best_epoch] == trainer.best_loss
    assert trainer.net is net
    assert _mse(net, trainer.validation_dataset) == pytest.approx(trainer.best_loss)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    best = trainer.best_net
    assert best is not None
    inputs = torch.randn(3, 4)
    kept = best(inputs)
    assert torch.equal(trainer.predict(inputs), kept)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert torch.equal(best(inputs), kept)
    assert not torch.equal(trainer.predict(inputs), kept)


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_training_stops_after_so_many_epochs_without_improvement(patience: int) -> None:
    net = _net()
    optimizer = _climb_after(12, SGD(net.parameters(), lr=0.05), factor=-0.1)
    trainer = _trainer(net, optimizer=optimizer, num_epochs=40, patience=patience)
    trainer.train()
    assert trainer.best_epoch < 4
    assert len(trainer.losses_train) == trainer.best_epoch + patience + 1
    assert len(trainer.losses_validation) == len(trainer.losses_train)


def test_without_patience_all_epochs_run() -> None:
    net = _net()
    optimizer = _climb_after(1, SGD(net.parameters(), lr=1e-3))
    trainer = _trainer(net, optimizer=optimizer, num_epochs=7)
    trainer.train()
    assert trainer.best_epoch == 0
    assert len(trainer.losses_train) == 7


def test_without_validation_part_the_training_loss_decides() -> None:
    trainer = _trainer(_net(), train_val_test_split=(1.0, 0.0))
    trainer.train()
    assert np.isnan(trainer.losses_validation).all()
    assert trainer.best_loss == min(trainer.losses_train)
    assert trainer.best_epoch == np.argmin(trainer.losses_train)


def test_training_again_goes_on_where_it_ended() -> None:
    trainer = _trainer(_net(), num_epochs=3)
    trainer.train()
    trainer.train()
    assert len(trainer.losses_train) == len(trainer.losses_validation) == 6
    assert trainer.losses_train[-1] < trainer.losses_train[2]
    assert trainer.losses_validation[trainer.best_epoch] == trainer.best_loss


def test_same_seed_same_run_other_seed_other_split() -> None:
    net = _net()
    runs = []
    for seed in (1, 1, 2):
        runs.append(_trainer(copy.deepcopy(net), seed=seed))
        runs[-1].optimizer = SGD(runs[-1].net.parameters(), lr=0.02)
        torch.rand(3)
        runs[-1].train()
    assert np.array_equal(runs[0].losses_train, runs[1].losses_train)
    assert runs[0].train_dataset.indices == runs[1].train_dataset.indices
    assert runs[0].train_dataset.indices != runs[2].train_dataset.indices


# --- the split -----------------------------------------------------------------------------


def _splits() -> st.SearchStrategy[tuple[float, ...]]:
    three = st.integers(60, 100).flatmap(
        lambda a: st.integers(0, 100 - a).map(lambda b: (a / 100, b / 100, (100 - a - b) / 100))
    )
    two = st.integers(60, 100).map(lambda a: (a / 100, (100 - a) / 100))
    return st.just((0.7, 0.2, 0.1)) | three | two


@given(st.integers(2, 2000), _splits())
@example(5, (0.7, 0.2, 0.1))
@example(15, (0.5, 0.5))
def test_defect_10_split_counts_sum_to_n(n: int, split: tuple[float, ...]) -> None:
    trainer = _trainer(TopKastLinear(1, 1, 0.0, 0.0), data=range(n), train_val_test_split=split)
    parts = (trainer.train_dataset, trainer.validation_dataset, trainer.test_dataset)
    assert sorted(i for part in parts for i in part.indices) == list(range(n))
    for part, fraction in zip(parts, (*split, 0.0), strict=False):
        assert abs(len(part) - fraction * n) <= 1


def test_defect_10_a_split_of_two_has_no_test_part_and_is_not_written_to() -> None:
    split = [0.75, 0.25]
    trainer = _trainer(_net(), train_val_test_split=split)
    assert split == [0.75, 0.25]
    assert inspect.signature(TopKastTrainer).parameters["train_val_test_split"].default == ((
        0.7,
        0.2,
        0.1,
    ))
    assert [len(trainer.train_dataset), len(trainer.validation_dataset)] == [30, 10]
    with pytest.raises(ValueError, match="no observations to evaluate on: the test part is empty"):
        trainer.eval()


def test_defaults_are_shares_of_the_data_and_the_epochs() -> None:
    net = _net()
    optimizer = SGD(net.parameters(), lr=0.1)
    trainer = TopKastTrainer(net, nn.MSELoss(), optimizer=optimizer, data=_data(200))
    assert trainer.num_epochs_explore == 5
    assert trainer.update_every == 10
    assert trainer.batch_size == 4
    assert trainer.patience == 50
    assert [len(trainer.train_dataset), len(trainer.validation_dataset)] == [140, 40]
    assert len(trainer.test_dataset) == 20


# --- what is shown -------------------------------------------------------------------------


def test_print_info_every_prints_both_losses(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(_net(), num_epochs=7, print_info_every=3)
    trainer.train()
    printed, progress = capsys.readouterr()
    lines = [line for line in printed.splitlines() if line]
    assert lines == [
        f"epoch {epoch}: training loss {trainer.losses_train[epoch - 1]:.6g}, "
        f"validation loss {trainer.losses_validation[epoch - 1]:.6g}"
        for epoch in (3, 6)
    ]
    assert "7/7" in progress
    assert f"train={trainer.losses_train[-1]:.4g}" in progress
    assert f"validation={trainer.losses_validation[-1]:.4g}" in progress


def test_print_loss_history_prints_the_losses_up_to_the_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = _trainer(_net(), print_loss_history=True)
    trainer.train()
    printed = capsys.readouterr().out
    assert f"training loss: {trainer.losses_train[: trainer.best_epoch + 1]}" in printed
    assert f"validation loss: {trainer.losses_validation[: trainer.best_epoch + 1]}" in printed


def test_plot_loss_returns_a_figure_of_both_losses() -> None:
    trainer = _trainer(_net())
    trainer.train()
    figure = trainer.plot_loss()
    assert isinstance(figure, Figure)
    train, validation = figure.axes[0].lines
    np.testing.assert_array_equal(train.get_ydata(), trainer.losses_train)
    np.testing.assert_array_equal(validation.get_ydata(), trainer.losses_validation)
    np.testing.assert_array_equal(train.get_xdata(), [1, 2, 3, 4])
    assert [train.get_label(), validation.get_label()] == ["training", "validation"]


def test_plot_loss_before_training_is_an_empty_figure() -> None:
    figure = _trainer(_net()).plot_loss()
    assert isinstance(figure, Figure)
    assert not figure.axes[0].lines


# --- the seed's example --------------------------------------------------------------------


class ReadmeNet(nn.Module):
    """The network of the seed's README."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_in = TopKastLinear(13, 128, p_forward=0.6, p_backward=0.5)
        self.activation = nn.ReLU()
        self.hidden1 = TopKastLinear(128, 128, p_forward=0.7, p_backward=0.5)
        self.layer_out = TopKastLinear(128, 1, p_forward=0.6, p_backward=0.5)

    def forward(self, inputs: Tensor, sparse: bool = True) -> Tensor:
        y = self.layer_in(inputs, sparse=sparse)
        y = self.hidden1(self.activation(y), sparse=sparse)
        output: Tensor = self.layer_out(self.activation(y), sparse=sparse)
        return output


def _readme(data: Dataset[Any], lr: float, num_epochs: int) -> TopKastTrainer:
    device = torch.device("cpu")
    net = ReadmeNet().to(device)
    loss = TopKastLoss(loss=nn.MSELoss, net=net, alpha=0.4, device=device)
    return TopKastTrainer(
        net,
        loss,
        num_epochs=num_epochs,
        num_epochs_explore=num_epochs // 2,
        update_every=3,
        batch_size=128,
        patience=20,
        optimizer=SGD(net.parameters(), lr=lr),
        data=data,
        device=device,
    )


def test_the_seeds_example_learns_from_the_first_epochs() -> None:
    trainer = _readme(boston_dataset, lr=1e-5, num_epochs=8)
    trainer.train()
    assert np.isfinite(trainer.losses_train).all()
    assert trainer.losses_train[-1] < 0.6 * trainer.losses_train[0]
    assert trainer.best_loss < trainer.losses_validation[0]


def test_the_seeds_example_in_full_stays_under_the_variance() -> None:
    trainer = _readme(boston_dataset, lr=1e-5, num_epochs=200)
    trainer.train()
    assert isinstance(trainer.plot_loss(), Figure)
    assert trainer.eval() < 84  # what predicting the mean gives; the seed came to 1302


def test_the_seeds_example_on_standardized_features_is_near_a_dense_network() -> None:
    trainer = _readme(BostonHousing(standardize=True), lr=1e-3, num_epochs=200)
    trainer.train()
    assert trainer.eval() <= 8  # a dense network comes to 5.3 to 6.2, the seed to 154.6


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, r"data is missing: pass a data set of pairs \(features, target\)"),
        ({"optimizer": None}, r"optimizer is missing: pass one built from net\.parameters\(\)"),
        (
            {"optimizer": SGD(nn.Linear(4, 1).parameters(), lr=0.1)},
            r"the optimizer holds no parameter of net: build it from net\.parameters\(\)",
        ),
        ({"train_val_test_split": (0.7, 0.2)}, r"sum 1, got \(0\.7, 0\.2\)"),
        ({"train_val_test_split": (0.7, 0.2, 0.2)}, r"sum 1, got \(0\.7, 0\.2, 0\.2\)"),
        ({"train_val_test_split": (1.0,)}, r"must be 2 or 3 fractions of sum 1, got \(1\.0,\)"),
        ({"train_val_test_split": (0.4, 0.2, 0.2, 0.2)}, r"must be 2 or 3 fractions of sum 1"),
        ({"train_val_test_split": (1.2, -0.2)}, r"train_val_test_split must be in \[0\.0, inf\)"),
        ({"train_val_test_split": (math.nan, 0.3)}, r"train_val_test_split must be in .*, got nan"),
        ({"train_val_test_split": (0.0, 1.0)}, r"of 40 observations leaves none to train on"),
        ({"data": []}, r"of 0 observations leaves none to train on"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"patience": -3}, "patience must be at least 1, got -3"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"print_info_every": 0}, "print_info_every must be at least 1, got 0"),
        ({"num_epochs_explore": -1}, "num_epochs_explore must be at least 0, got -1"),
        ({"num_epochs_explore": 5}, r"must be in \[0, num_epochs=4\], got 5"),
        ({"update_every": 0}, "update_every must be at least 1, got 0"),
        ({"device": "meta"}, "device must be a device that holds values, which 'meta' does not"),
        ({"device": "nowhere"}, "device must be a device that is there, got 'nowhere'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _trainer(_net(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, r"optimizer must be a torch\.optim\.Optimizer, got 'sgd'"),
        ({"optimizer": SGD}, r"optimizer must be a torch\.optim\.Optimizer, got <class"),
        ({"patience": 2.5}, r"patience must be an integer of at least 1, got 2\.5"),
        ({"patience": True}, "patience must be an integer of at least 1, got True"),
        ({"num_epochs": "9"}, "num_epochs must be an integer of at least 1, got '9'"),
        ({"batch_size": 8.0}, r"batch_size must be an integer of at least 1, got 8\.0"),
        (
            {"train_val_test_split": ("0.7", 0.3)},
            r"train_val_test_split must be a number .* '0\.7'",
        ),
        ({"train_val_test_split": None}, "train_val_test_split must be 2 or 3 fractions.* None"),
        ({"callbacks": 3}, "callbacks must be a Sequence, got int: pass functions in a list"),
        (
            {"callbacks": print},
            "callbacks must be a Sequence, got builtin_function_or_method: pass",
        ),
        ({"callbacks": [print, 3]}, r"callbacks\[1\] must be callable, got int"),
        ({"loss": "mse"}, "loss must be callable, got str"),
        ({"loss": None}, "loss must be callable, got NoneType"),
        (
            {"loss": TopKastLoss},
            "loss must be a function .* got TopKastLoss: .* missing 2 required",
        ),
        ({"train_val_test_split": 0.7}, r"train_val_test_split must be 2 or 3 fractions.* 0\.7"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _trainer(_net(), **options)


def test_a_net_that_is_no_module_is_refused() -> None:
    net: Any = [_net()]
    with pytest.raises(TypeError, match="net must be a Module, got list"):
        TopKastTrainer(net, nn.MSELoss(), optimizer=SGD(net[0].parameters(), 0.1), data=_data())


def test_a_net_without_values_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 1, device="meta"))
    with pytest.raises(ValueError, match=r"'0\.weight' of net is on the meta device"):
        _trainer(net)


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    """Pairs that can only be read in order."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(_data())

    def __len__(self) -> int:
        return 40


NOT_PAIRS: dict[str, Any] = {
    "loader": DataLoader(_data()),
    "tensor": torch.ones(40, 4),
    "array": np.ones((40, 5)),
    "stream": Streamed(),
    "iterator": iter(_data()),
    "class": BostonHousing,
    "number": 3,
    "one": (torch.ones(40, 4),),
    "three": [torch.ones(40, 4)] * 3,
    "arrays": (np.ones((40, 4)), np.ones(40)),
    "dictionary": {"features": torch.ones(40, 4), "target": torch.ones(40)},
}
"""What gives no pairs (features, target), as can be seen without a look at an observation."""


@pytest.mark.parametrize("data", NOT_PAIRS.values(), ids=NOT_PAIRS.keys())
def test_data_of_another_kind_are_refused_by_name(data: Any) -> None:
    told = r"must be a (map-style data set of pairs|pair) \(features, target\).* got "
    with pytest.raises(TypeError, match=rf"^data {told}"):
        _trainer(_net(), data=data)
    trainer = _trainer(_net())
    with pytest.raises(TypeError, match=rf"^test_data {told}"):
        trainer.eval(data)


def test_a_loader_is_refused_with_the_way_on() -> None:
    with pytest.raises(TypeError, match=r"got DataLoader: pass its dataset$"):
        _trainer(_net(), data=DataLoader(_data()))


@pytest.mark.parametrize(
    "data",
    [
        [1, 2, 3, 4],
        TensorDataset(torch.ones(40, 4)),
        TensorDataset(*[torch.ones(40, 4)] * 3),
        [{"features": torch.ones(4), "target": torch.ones(1)}] * 40,
        [(torch.ones(4), "one")] * 40,
    ],
    ids=["numbers", "one", "three", "names", "text"],
)
def test_observations_that_are_no_pairs_are_refused_by_name(data: Any) -> None:
    told = r"must be of pairs \(features, target\) of tensors or numbers, and a batch of them is"
    with pytest.raises(TypeError, match=rf"^data {told}"):
        _trainer(_net(), data=data).train()
    trainer = _trainer(_net(), batch_size=2)
    with pytest.raises(TypeError, match=rf"^test_data {told}"):
        trainer.eval(data)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_of_tensors_is_data_to_train_and_to_evaluate_on(kind: Any) -> None:
    net, pair = _net(), kind(_pair(_data()))
    found, expected = (_trainer(copy.deepcopy(net), data=data) for data in (pair, _data()))
    assert found.eval() == expected.eval()
    assert found.eval(pair) == expected.eval(_data())


@pytest.mark.parametrize("features", [torch.ones(13, 4), torch.tensor(1.0)])
def test_a_pair_of_unequal_length_is_refused_by_name(features: Tensor) -> None:
    told = "must be as many features as targets, got tensors of"
    with pytest.raises(ValueError, match=f"^data {told}"):
        _trainer(_net(), data=(features, torch.ones(12)))
    trainer = _trainer(_net())
    with pytest.raises(ValueError, match=f"^test_data {told}"):
        trainer.eval((features, torch.ones(12)))


@pytest.mark.parametrize("data", [np.ones((3, 4)), [[1.0] * 4], _data(), None])
def test_features_that_are_no_tensor_are_refused_by_name(data: Any) -> None:
    trainer = _trainer(_net())
    with pytest.raises(TypeError, match=r"^data must be a Tensor, got .*torch\.as_tensor"):
        trainer.predict(data)


def test_a_net_whose_sets_the_trainer_does_not_choose_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), TopKastLinear(16, 1, 0.5, 0.2))
    sparsify(net[0], TopKastConfig())
    with pytest.raises(ValueError, match="net was made sparse by sparsify"):
        _trainer(net)


def test_data_that_does_not_fit_the_net_is_refused_and_trains_nothing() -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    data = TensorDataset(torch.randn(20, 3), torch.randn(20))
    with pytest.raises(ValueError, match="do not fit a layer of in_features=4"):
        _trainer(net, data=data).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "kind", "told"),
    [
        (nn.MSELoss(reduction="none"), TypeError, r"must return a scalar, got .* \(8, 1\)"),
        (
            lambda y_hat, y: 1.0,
            TypeError,
            "what loss returns must be a Tensor, got float: a scalar",
        ),
        (lambda y_hat, y: mse_loss(y_hat.detach(), y), ValueError, "not depend on what is trained"),
    ],
    ids=["entries", "number", "detached"],
)
def test_a_loss_that_cannot_be_differentiated_is_refused_and_trains_nothing(
    loss: Any, kind: type[Exception], told: str
) -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(kind, match=told):
        _trainer(net, loss=loss).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_eval_of_no_observations_is_refused() -> None:
    trainer = _trainer(_net())
    with pytest.raises(ValueError, match="no observations to evaluate on"):
        trainer.eval((torch.empty(0, 4), torch.empty(0)))


def test_a_loss_that_is_not_finite_ends_training_with_a_warning_and_the_best_network() -> None:
    net = _net()
    optimizer = SGD(net.parameters(), lr=0.02)
    counter = count(1)

    def explode(optimizer: Optimizer, *_: Any) -> None:
        if next(counter) == 10:
            optimizer.param_groups[0]["lr"] = 1e20

    optimizer.register_step_post_hook(explode)
    trainer = _trainer(net, optimizer=optimizer, num_epochs=20)
    with pytest.warns(UserWarning, match=r"training ends: the loss of epoch 3 is (nan|inf)"):
        trainer.train()
    assert len(trainer.losses_train) == 3
    assert not math.isfinite(trainer.losses_train[2])
    assert trainer.best_epoch < 2
    assert _mse(net, trainer.validation_dataset) == pytest.approx(trainer.best_loss)


def test_a_loss_that_is_never_finite_keeps_the_net_and_says_so() -> None:
    net = TopKastLinear(4, 1, 0.5, 0.0)
    data = TensorDataset(torch.full((20, 4), math.nan), torch.randn(20))
    before = torch.stack(net.idx_fwd)
    trainer = _trainer(net, data=data)
    with pytest.warns(UserWarning, match="training ends: the loss of epoch 1 is nan"):
        trainer.train()
    assert trainer.best_net is None
    assert torch.equal(torch.stack(net.idx_fwd), before)


def test_a_step_to_nan_at_the_end_of_an_epoch_ends_training_with_the_best_network() -> None:
    net = _net()
    optimizer = SGD(net.parameters(), lr=0.02)
    counter = count(1)

    def spoil(*_: Any) -> None:
        if next(counter) == 8:  # the last of the second epoch: its training loss is still finite
            with torch.no_grad():
                _sparse(net)[0].weight.fill_(math.nan)

    optimizer.register_step_post_hook(spoil)
    trainer = _trainer(net, optimizer=optimizer, num_epochs=6, num_epochs_explore=6)
    with pytest.warns(UserWarning, match="training ends"):
        trainer.train()
    assert trainer.best_epoch == 0
    assert _mse(net, trainer.validation_dataset) == pytest.approx(trainer.best_loss)


def test_a_callback_ends_the_training_after_all_were_called() -> None:
    net, epochs = _net(), []

    def note(trainer: TopKastTrainer) -> None:
        epochs.append(len(trainer.losses_validation))

    trainer = _trainer(net, callbacks=[lambda trainer: len(trainer.losses_train) == 2, note])
    trainer.train()
    assert epochs == [1, 2]
    trainer.train()
    assert epochs == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("own")], ids=repr)
def test_an_exception_leaves_the_best_epoch_and_its_losses(failure: BaseException) -> None:
    net, losses = _net(), []

    def break_off(trainer: TopKastTrainer) -> None:
        losses.append(_mse(net, trainer.validation_dataset))
        if len(losses) == 3:
            raise failure

    steps = 2 * math.ceil(28 / 8)
    optimizer = _climb_after(steps, SGD(net.parameters(), lr=0.02), -20.0)
    trainer = _trainer(net, optimizer=optimizer, callbacks=[break_off])
    with pytest.raises(type(failure)):
        trainer.train()
    assert len(trainer.losses_train) == 3
    assert losses[2] > losses[1] == min(losses)
    assert _mse(net, trainer.validation_dataset) == pytest.approx(losses[1], rel=1e-5)


class Keeping(nn.Sequential):
    """Keeps an activation."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self[0](x).relu()
        y: Tensor = self[1](self.kept)
        return y


def test_a_net_that_keeps_an_activation_trains_without_a_validation_part() -> None:
    net, x = Keeping(TopKastLinear(8, 32, 0.8, 0.6), nn.Linear(32, 1)), torch.randn(16, 8)
    trainer = TopKastTrainer(
        net,
        nn.MSELoss,
        2,
        optimizer=torch.optim.Adam(net.parameters()),
        data=(x, x[:, :1]),
        train_val_test_split=(1.0, 0.0),
        batch_size=8,
    )
    trainer.train()
    assert trainer.best_net is not None
