"""Whether a forward pass that does not do the same again is told of, and any other is not."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk

CONFIG = tk.TopKastConfig(forward_sparsity=0.7, backward_sparsity=0.4)
OPTIMIZER = tk.sgd(0.01)
BATCH = (torch.linspace(-1, 1, 24).view(4, 6), torch.zeros(4, 3))


def mse(apply: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


class Layer(nn.Module):
    """A layer beside what the tests add to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.norm(self.layer(x)))
        return out


class Counting(Layer):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Averaging(Layer):
    """A running mean that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x[0]
        return super().forward(x) + self.mean.sum()


class Drawing(Layer):
    """Random numbers from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand((), generator=self.generator)


class Caching(Layer):
    """What is made at the first call, and read at the others."""

    longest = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.longest:
            self.longest, self.positions = len(x), torch.arange(len(x))
        return super().forward(x + self.positions[: len(x), None])


def steps(model: nn.Module, compile: Any = False, loss: Any = mse) -> list[float]:
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=compile)
    return [float(train_step(state, BATCH)[1].loss) for _ in range(3)]


def test_numbers_that_count_calls_are_named_and_count_the_steps_alone() -> None:
    model = Counting()
    with pytest.warns(UserWarning, match=r"gives, called twice.* and changes \['calls'\] of the"):
        losses = steps(model)
    assert model.calls == 3
    assert losses[2] == pytest.approx(9 * losses[0], rel=1e-3)  # beside a penalty
    with pytest.warns(UserWarning, match=r"changes \['calls'\] of the model at each call"):
        steps(Counting(), compile={"backend": "aot_eager"})


@pytest.mark.parametrize("model", [Averaging, Drawing])
def test_a_forward_pass_that_does_not_do_the_same_again_is_told_of(model: Any) -> None:
    with pytest.warns(UserWarning, match="loss_fn gives, called twice, the losses .* and .*buffer"):
        steps(model())


def test_a_loss_that_draws_from_another_generator_is_told_of() -> None:
    def mixed(apply: Any, batch: Any) -> Tensor:
        return random.random() * mse(apply, batch)

    with pytest.warns(UserWarning, match="Draw random numbers by torch"):
        steps(Layer(), loss=mixed)


@pytest.mark.parametrize("model", [Layer, Caching])
def test_what_does_the_same_again_is_not_warned_of(model: Any) -> None:
    first, *others = steps(model())
    assert others == [first, first]


def test_a_number_that_a_module_has_counts_the_steps_alone() -> None:
    for start in (10, 10.5):
        model = Counting()
        model.calls = start  # type: ignore[assignment]
        with pytest.warns(UserWarning, match=r"changes \['calls'\] of the model at each call"):
            steps(model)
        assert model.calls == start + 3


def test_each_mode_is_tried_twice_and_then_no_more() -> None:
    calls = []

    def counted(apply: Any, batch: Any) -> Tensor:
        calls.append(0)
        return mse(apply, batch)

    steps(Layer(), loss=counted)
    assert len(calls) == 2 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_that_differ_by_rounding_or_are_no_numbers_are_not_told_of(
    dtype: torch.dtype,
) -> None:
    calls = []

    def rounded(apply: Any, batch: Any) -> Tensor:
        calls.append(0)
        seen = mse(apply, batch).to(dtype)
        return seen - seen.detach() + (1 + len(calls) % 2 * torch.finfo(dtype).eps)

    steps(Layer(), loss=rounded)
    steps(Layer(), loss=lambda apply, batch: mse(apply, batch) * torch.nan)
