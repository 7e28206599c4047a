"""A loop over batches that tells others what happens: callbacks."""

from collections.abc import Iterable, Sequence
from typing import Any

from topkast_func.config import TopKastConfig
from topkast_func.training.state import TrainState
from topkast_func.training.step import StepMetrics, TrainStep


class Callback:
    """Is told of steps and refreshes; override what you need."""

    def on_step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Take note of a step.

        Args:
            state: The state after it; ``state.step`` steps have been made.
            metrics: What the step returned.
        """

    def on_refresh(self, before: TrainState, after: TrainState) -> None:
        """Take note of a refresh; it is told of before the step that it was part of.

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

    Raises:
        ValueError: ``train_step`` was made with another configuration.

    Example:
        >>> import torch
        >>> from topkast_func import init_state, make_train_step, sgd
        >>> model, config, optimizer = torch.nn.Linear(4, 1), TopKastConfig(), sgd(lr=0.1)
        >>> loss_fn = lambda apply, batch: (apply(batch) ** 2).mean()
        >>> train_step = make_train_step(model, loss_fn, config, optimizer, compile=False)
        >>> state = init_state(model, config, optimizer)
        >>> state = train(train_step, state, torch.ones(3, 8, 4), config)
        >>> int(state.step)
        3
    """
    own = getattr(train_step, "config", config)
    if own != config:
        raise ValueError(f"train_step was made with another configuration, {own}, than {config}")
    for batch in batches:
        before = state
        state, metrics = train_step(before, batch)
        for callback in callbacks:
            if metrics.refreshed:
                callback.on_refresh(before, state)
            callback.on_step(state, metrics)
    return state
