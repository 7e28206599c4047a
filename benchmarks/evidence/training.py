"""One run: train as a setting says, and score."""

import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

import topkast_func as tk
from benchmarks.evidence.settings import SMALL, Setting
from benchmarks.evidence.tasks import TASKS, Batch, Task, loss_fn

Step: TypeAlias = tuple[tk.TrainState, tk.TrainState, tk.StepMetrics, Batch]  # before and after


def run(setting: Setting) -> dict[str, Any]:
    """Train and score.

    Returned are the ``score`` of the last state; the ``flops`` of training over those of the dense
    network (dense gradients at the refreshes of RigL left out); the share of the sparse weights
    that was ever ``explored``; the ``shock``, median and largest over the refreshes: the loss of
    the batch at hand with the new sets over that with the old ones, None where they are drawn anew
    too often; the ``parameters`` that the trained network uses, and ``seconds``.
    """
    begin, task = time.perf_counter(), TASKS[setting.task]
    torch.manual_seed(setting.seed)
    static = Setting(setting.task, "static", setting.forward, setting.backward)
    small = setting.method == SMALL
    model = task.network(_used(_untrained(task, static)[1]) if small else None)
    state, told = _trained(setting, task, model)
    with torch.no_grad():
        score = task.score(partial(_at, model, tk.forward_params(state)), setting.validate)
    whole = tk.training_flops(*_untrained(task, Setting(setting.task, "dense")), task.sample).dense
    told |= {"score": score, "flops": told["flops"] / whole, "parameters": _used(state)}
    return {**told, "seconds": time.perf_counter() - begin}


def jumps(setting: Setting, refreshes: int = 30) -> list[float]:
    """Return the loss at each step around a refresh, as means over so many refreshes.

    They begin half an interval before the tenth one.
    """
    every, task = setting.refresh_every, TASKS[setting.task]
    torch.manual_seed(0)
    steps = steps_of(setting, task, task.network(None))
    told = islice(steps, 19 * every // 2, (19 + 2 * refreshes) * every // 2)
    losses = torch.stack([metrics.data_loss for _, _, metrics, _ in told])
    return [round(loss, 4) for loss in losses.view(refreshes, every).mean(0).tolist()]


def steps_of(setting: Setting, task: Task, model: nn.Module) -> Iterator[Step]:
    """Train as a setting says, step by step."""
    steps = round(setting.steps * task.steps)
    config = setting.config(model, steps)
    rate = partial(_rate, setting.lr, task.warm_up, steps)
    if task.momentum is None:
        betas = (task.betas[0], setting.beta2 or task.betas[1])
        optimizer = tk.adam(rate, betas, weight_decay=setting.weight_decay)
    else:
        optimizer = tk.sgd(rate, task.momentum, weight_decay=setting.weight_decay)
    storage: Any = "dense" if setting.often else "compact"
    state = tk.init_state(model, config, optimizer, storage=storage, seed=setting.seed)
    train_step = tk.make_train_step(model, loss_fn, config, optimizer)
    for _, batch in zip(range(steps), task.batches(setting.validate, setting.seed), strict=False):
        before = state
        state, metrics = train_step(before, batch)
        yield before, state, metrics, batch


def _trained(
    setting: Setting, task: Task, model: nn.Module
) -> tuple[tk.TrainState, dict[str, Any]]:
    counted: dict[tuple[int, ...], float] = {}
    explored, flops, shocks = dict[str, Tensor](), list[float](), list[float]()
    for before, state, metrics, batch in steps_of(setting, task, model):
        if metrics.refreshed and not setting.often:
            with torch.no_grad():
                old = loss_fn(partial(_at, model, tk.forward_params(before)), batch)
            shocks.append(float(metrics.data_loss) / float(old))
        if metrics.refreshed or not flops:
            masks = tk.masks_of(state)
            explored = tk.explored(masks, explored or None)
            sizes = tuple(int(mask.sum()) for several in masks.values() for mask in several)
            if sizes not in counted:
                counted[sizes] = tk.training_flops(model, state, task.sample).sparse
        flops.append(counted[sizes])
    return state, {
        "flops": statistics.fmean(flops),
        "explored": tk.exploration_rate(explored) if explored else None,
        "shock": (statistics.median(shocks), max(shocks)) if shocks else None,
    }


def _at(model: nn.Module, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    outputs: Tensor = functional_call(model, weights, (inputs,))
    return outputs


def _rate(lr: float, warm_up: int, steps: int, step: Tensor) -> Tensor:
    """Return the learning rate of a step: half a cosine down to 0, after a line up to it."""
    rising = ((step + 1) / warm_up).clamp(max=1)
    return rising * lr / 2 * (1 + torch.cos(math.pi * step / steps))


def _untrained(task: Task, setting: Setting) -> tuple[nn.Module, tk.TrainState]:
    model = task.network(None)
    return model, tk.init_state(model, setting.config(model, 1), tk.sgd(0.0))


def _used(state: tk.TrainState) -> int:
    """Return how many parameters a state computes with."""
    return sum(row.forward for row in tk.summary(state).rows)
