"""The best state of a run: kept, saved, and a reason to stop where none better comes."""

import math
import os
from collections.abc import Callable
from typing import SupportsFloat

from topkast_func.checks import check_callable, check_count, check_type
from topkast_func.config import TopKastConfig
from topkast_func.files.drafts import path_of
from topkast_func.training.checkpoint import save
from topkast_func.training.loop import Callback
from topkast_func.training.metrics import StepMetrics
from topkast_func.training.state import TrainState


class Best(Callback):
    """Keeps the best state of a training, and stops it early if asked to.

    Args:
        measure: ``measure(state)`` to the number that is to be low, such as the loss on held-out
            data at ``forward_params(state)``; of an accuracy give the negative.
        every: Steps between two measures, at least 1.
        patience: Stop after so many measures without a better one, at least 1; None for never.
        path: Where to `save` the state whenever it is the best so far; None for nowhere.
        config: The configuration to save with it.

    Attributes:
        state: The first state of the lowest measure; None as long as none was finite.
        step: Steps that had been made by then.
        value: What it measured; infinite at first.
        values: All measures, in order.

    Raises:
        TypeError: ``every`` or ``patience`` is no integer, ``measure`` cannot be called, ``path``
            is none, or ``config`` no configuration.
        ValueError: One of them is below 1.

    Example:
        >>> import torch
        >>> from topkast_func import init_state, make_train_step, sgd, train
        >>> model, config, optimizer = torch.nn.Linear(4, 1), TopKastConfig(), sgd(lr=0.1)
        >>> loss_fn = lambda apply, batch: (apply(batch) ** 2).mean()
        >>> train_step = make_train_step(model, loss_fn, config, optimizer, compile=False)
        >>> state, best = init_state(model, config, optimizer), Best(lambda _: 1.0, patience=2)
        >>> state = train(train_step, state, torch.ones(9, 8, 4), config, [best])
        >>> int(state.step), best.step
        (3, 1)
    """

    def __init__(
        self,
        measure: Callable[[TrainState], SupportsFloat],
        every: int = 1,
        patience: int | None = None,
        path: str | os.PathLike[str] | None = None,
        config: TopKastConfig | None = None,
    ) -> None:
        check_callable("measure", measure)
        if config is not None:
            check_type("config", config, TopKastConfig)
        self.measure = measure
        self.every = check_count("every", every, 1)
        self.patience = None if patience is None else check_count("patience", patience, 1)
        self.path = None if path is None else path_of("path", path)
        self.config = config
        self.state: TrainState | None = None
        self.step, self.value = 0, math.inf
        self.values: list[float] = []
        self._waited = self._seen = 0

    def on_step(self, state: TrainState, metrics: StepMetrics) -> bool:
        """Measure if it is time to; ask to stop when patience ends."""
        step = int(state.step)
        if step % self.every or step == self._seen:
            return False
        self._seen = step
        value = float(self.measure(state))
        self.values.append(value)
        self._waited += 1
        if value < self.value:
            self.state, self.step, self.value, self._waited = state, step, value, 0
            if self.path is not None:
                save(state, self.path, self.config)
        return self.patience is not None and self._waited >= self.patience
