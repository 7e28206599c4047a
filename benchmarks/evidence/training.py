"""One run: train as a setting says, and score."""

import math
import statistics
import time
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import topkast_func as tk
from benchmarks.evidence.settings import SMALL, Setting
from benchmarks.evidence.tasks import TASKS, Batch, Task, loss_fn
from topkast_func.training.state import Storage

OFTEN = 10
"""Steps between refreshes below which indexing the sets anew costs more than dense storage."""


def run(setting: Setting) -> dict[str, Any]:
    """Train and score.

    Args:
        setting: What to do.

    Returns:
        ``score`` of the last state, ``flops`` of training over those of the dense network
        (dense gradients at the refreshes of RigL left out), ``explored`` (share of the sparse
        weights that were ever in A), ``parameters`` that the trained network uses, ``seconds``,
        and ``shock``, median and largest over the refreshes: the loss of the batch at hand with
        the new sets over that with the old ones; None where the sets are drawn anew too often.
    """
    start, task = time.perf_counter(), TASKS[setting.task]
    torch.manual_seed(setting.seed)
    model = task.network(_parameters(setting, task) if setting.method == SMALL else None)
    steps = round(setting.steps * task.steps)
    config = setting.config(model, steps)
    rate = partial(_rate, setting.lr, task.warm_up, steps)
    betas = (task.betas[0], setting.beta2 or task.betas[1])
    optimizer = tk.adam(rate, betas, weight_decay=setting.weight_decay)
    storage: Storage = "dense" if setting.refresh_every < OFTEN else "compact"
    state = tk.init_state(model, config, optimizer, storage=storage, seed=setting.seed)
    step = tk.make_train_step(model, loss_fn, config, optimizer)
    batches = islice(task.batches(setting.validate, setting.seed), steps)
    watch = _Watch(model, task, state, often=setting.refresh_every < OFTEN)
    state = tk.train(step, state, map(watch.seen, batches), config, [watch])
    with torch.no_grad():
        apply = partial(_at, model, tk.forward_params(state))
        score = task.score(apply, setting.validate)
    return {
        "score": score,
        "flops": watch.flops / steps / _dense_flops(setting, task),
        "explored": tk.exploration_rate(watch.explored) if watch.explored else None,
        "parameters": _used(state),
        "seconds": time.perf_counter() - start,
        "shock": (statistics.median(watch.shocks), max(watch.shocks)) if watch.shocks else None,
    }


def _at(model: nn.Module, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    outputs: Tensor = functional_call(model, weights, (inputs,))
    return outputs


class _Watch(tk.Callback):
    """Adds up operations, and keeps the shocks and which weights were ever in A."""

    def __init__(self, model: nn.Module, task: Task, state: tk.TrainState, often: bool) -> None:
        self.model, self.inputs, self.often = model, task.sample, often
        self.flops, self.explored = 0.0, tk.explored(tk.masks_of(state))
        self.shocks: list[float] = []
        self._batch: Any = None
        self._loss: float | None = None
        self._known: dict[tuple[int, ...], float] = {}
        self._per_step = self._flops(state)

    def on_step(self, state: tk.TrainState, metrics: tk.StepMetrics) -> None:
        self.flops += self._per_step
        if self._loss is not None:
            self.shocks.append(float(metrics.data_loss) / self._loss)
            self._loss = None

    def on_refresh(self, before: tk.TrainState, after: tk.TrainState) -> None:
        self.explored = tk.explored(tk.masks_of(after), self.explored)
        self._per_step = self._flops(after)
        if not self.often:
            with torch.no_grad():
                apply = partial(_at, self.model, tk.forward_params(before))
                self._loss = float(loss_fn(apply, self._batch))

    def seen(self, batch: Batch) -> Batch:
        """Keep a batch, and hand it on."""
        self._batch = batch
        return batch

    def _flops(self, state: tk.TrainState) -> float:
        """Return the operations of a step; they are those of any state with as large sets."""
        sets = (mask for masks in tk.masks_of(state).values() for mask in masks)
        sizes = tuple(int(mask.count_nonzero()) for mask in sets)
        if sizes not in self._known:
            counted = tk.training_flops(self.model, state, self.inputs)
            self._known[sizes] = counted.sparse
        return self._known[sizes]


def _rate(lr: float, warm_up: int, steps: int, step: Tensor) -> Tensor:
    """Return the learning rate of a step: half a cosine down to 0, after a line up to it."""
    rising = ((step + 1) / warm_up).clamp(max=1)
    return rising * lr / 2 * (1 + torch.cos(math.pi * step / steps))


def _used(state: tk.TrainState) -> int:
    return sum(row.forward for row in tk.summary(state).rows)


def _parameters(setting: Setting, task: Task) -> int:
    """Return how many parameters a sparse network of this setting uses."""
    model = task.network(None)
    config = Setting(setting.task, "static", setting.forward, setting.backward).config(model, 1)
    return _used(tk.init_state(model, config, tk.sgd(0.0)))


def _dense_flops(setting: Setting, task: Task) -> float:
    """Return the operations of a step of the dense network of full size, per input."""
    model = task.network(None)
    state = tk.init_state(model, Setting(setting.task, "dense").config(model, 1), tk.sgd(0.0))
    return tk.training_flops(model, state, task.sample).dense
