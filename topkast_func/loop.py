"""A loop over batches that tells others what happens: callbacks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from topkast_func.config import TopKastConfig
from topkast_func.exchange import Exchange, exchanges, exploration_rate, explored
from topkast_func.flops import TrainingFlops
from topkast_func.state import TrainState, masks_of, refreshes_at
from topkast_func.training import StepMetrics, TrainStep
from topkast_func.types import Tensors


class Callback:
    """Is told of steps and refreshes; override what you need."""

    def on_step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Take note of a step.

        Args:
            state: The state after it; ``state.step`` steps have been made.
            metrics: What the step returned.
        """

    def on_refresh(self, before: TrainState, after: TrainState) -> None:
        """Take note of a refresh; it is told before the step that it was part of.

        Args:
            before: The state before the refresh.
            after: The state after the refresh and the step.
        """


def train(
    train_step: TrainStep,
    state: TrainState,
    batches: Iterable[Any],
    config: TopKastConfig,
    callbacks: Sequence[Callback] = (),
) -> TrainState:
    """Train on batches, one step each.

    Args:
        train_step: What `make_train_step` returned.
        state: Where to start.
        batches: Whatever the loss takes.
        config: The configuration of the step.
        callbacks: Who is told.

    Returns:
        The state after the last step.

    Example:
        >>> import torch
        >>> from topkast_func import init_state, make_train_step, sgd
        >>> model, config, optimizer = torch.nn.Linear(4, 1), TopKastConfig(), sgd(lr=0.1)
        >>> loss_fn = lambda apply, batch: (apply(batch) ** 2).mean()
        >>> train_step = make_train_step(model, loss_fn, config, optimizer, compile=False)
        >>> state, history = init_state(model, config, optimizer), History()
        >>> state = train(train_step, state, torch.ones(3, 8, 4), config, [history])
        >>> len(history.losses), history.refreshes
        (3, [])
    """
    for batch in batches:
        before = state
        state, metrics = train_step(before, batch)
        for callback in callbacks:
            if refreshes_at(config, int(before.step)):
                callback.on_refresh(before, state)
            callback.on_step(state, metrics)
    return state


class Refresh(NamedTuple):
    """What is known of one refresh.

    Attributes:
        step: Number of the step before which it was.
        exchanges: What it did, by parameter.
        exploration_rate: Share of the sparse weights that have ever been in A, fraction.
        flops: Operations of a step with the new sets; None where the history does not count them.
    """

    step: int
    exchanges: dict[str, Exchange]
    exploration_rate: float
    flops: TrainingFlops | None = None


class History(Callback):
    """Keeps the losses of all steps, and what every refresh did.

    Args:
        flops: Counts the operations of a step, such as
            ``lambda state: training_flops(model, state, inputs)``; None to leave them out.

    Attributes:
        losses: Loss of the data at each step.
        refreshes: What is known of each refresh.
    """

    def __init__(self, flops: Callable[[TrainState], TrainingFlops] | None = None) -> None:
        self._flops = flops
        self.losses: list[float] = []
        self.refreshes: list[Refresh] = []
        self._explored: Tensors = {}

    def on_step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Keep the loss."""
        self.losses.append(float(metrics.data_loss))

    def on_refresh(self, before: TrainState, after: TrainState) -> None:
        """Keep what changed."""
        old, new = masks_of(before), masks_of(after)
        self._explored = explored(new, self._explored or explored(old))
        rate = exploration_rate(self._explored)
        flops = self._flops(after) if self._flops else None
        self.refreshes.append(Refresh(int(before.step), exchanges(old, new), rate, flops))
