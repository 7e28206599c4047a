"""A loop over batches that tells others what happens: callbacks."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from topkast_func.checks import check_callable, check_type
from topkast_func.compiling import stopwatch
from topkast_func.config import TopKastConfig
from topkast_func.training.build import TrainStep
from topkast_func.training.metrics import StepMetrics
from topkast_func.training.state import TrainState, check_state

KEPT = (
    "topkast_func: the state after {} steps is kept as the attribute `state` of this exception; "
    "at a prompt it is sys.last_value.state"
)


class Callback:
    """Learns of steps and refreshes, and may stop the training; override what you need."""

    def on_step(self, state: TrainState, metrics: StepMetrics) -> bool | None:
        """Take note of a step.

        Args:
            state: The state after it; ``state.step`` steps have been made.
            metrics: What the step returned.

        Returns:
            True to let this step be the last; None or False to go on.
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
    *,
    progress: bool = False,
) -> TrainState:
    """Train on batches, one step each, until they or a callback end it.

    Nothing is lost where an exception ends it, a callback's, the model's or `KeyboardInterrupt`
    (Ctrl-C): the exception goes on its way as it is, and has the state after the last whole step
    as its attribute ``state``.

    Args:
        train_step: What `make_train_step` returned.
        state: Where to start.
        batches: Whatever the loss takes.
        config: The configuration of the step.
        callbacks: Who is told; all are told of a step before one of them stops the training.
        progress: Whether to show a progress bar with the loss, and in the end the seconds of
            training and of compilation, on the standard error.

    Returns:
        The state after the last step.

    Raises:
        TypeError: ``train_step`` cannot be called, ``state`` is no state, or a callback is none.
        ValueError: ``train_step`` was made with another configuration, or ``state`` is an ensemble
            of states, stacked.

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
    check_callable("train_step", train_step)
    check_type("callbacks", callbacks, Sequence)
    own = getattr(train_step, "config", config)
    if own != config:
        raise ValueError(f"train_step was made with another configuration, {own}, than {config}")
    for callback in callbacks:
        whole = all(hasattr(callback, hook) for hook in ("on_step", "on_refresh"))
        if isinstance(callback, type) or not whole:
            raise TypeError(f"callbacks must be instances of tk.Callback, got {callback!r}")
    check_state(state)
    times = stopwatch()
    try:
        with tqdm(batches, desc="training", unit="step", disable=not progress) as bar:
            for batch in bar:
                before = state
                state, metrics = train_step(before, batch)
                if progress:
                    bar.set_postfix(loss=f"{float(metrics.data_loss):.4g}", refresh=False)
                if _told(callbacks, before, state, metrics):
                    break
    except BaseException as failure:
        vars(failure)["state"] = state
        if sys.version_info >= (3, 11):
            failure.add_note(KEPT.format(int(state.step)))
        raise
    if progress:
        print(times(), file=sys.stderr)
    return state


def _told(
    callbacks: Sequence[Callback], before: TrainState, after: TrainState, metrics: StepMetrics
) -> bool:
    """Call the callbacks after a step; return whether one asks to stop."""
    asked = []
    for callback in callbacks:
        if metrics.refreshed:
            callback.on_refresh(before, after)
        asked.append(callback.on_step(after, metrics))
    return any(asked)
