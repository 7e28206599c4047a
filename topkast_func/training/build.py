"""The step of a process, alone or one of several, put together of its parts."""

from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves

from topkast_func.checks import check_callable, check_type
from topkast_func.compiling import one_report
from topkast_func.config import TopKastConfig
from topkast_func.config.as_json import described
from topkast_func.distributed.batches import Samples
from topkast_func.distributed.joined import data_parallel
from topkast_func.distributed.models import about
from topkast_func.distributed.ranks import Ranks
from topkast_func.kernels.engines import EngineName, check_engine
from topkast_func.model.alone import (
    alone_with,
    as_plain,
    as_written,
    check_uncompiled,
    claim,
    parts_of,
    uncompiled,
)
from topkast_func.model.layers import stand_ins, standing_in
from topkast_func.penalty import terms_of
from topkast_func.training.agreement import agreement
from topkast_func.training.call import Call, call_of
from topkast_func.training.compilation import compiler_of
from topkast_func.training.ensembles import is_mapped, mapped
from topkast_func.training.gradients import gradients_of
from topkast_func.training.loss import check_loss_fn
from topkast_func.training.metrics import StepMetrics
from topkast_func.training.optim import Optimizer, check_optimizer
from topkast_func.training.random_numbers import Draws
from topkast_func.training.refresh import refreshed_if_finite
from topkast_func.training.state import TrainState, check_fields, ordinary
from topkast_func.training.trial import Trials
from topkast_func.training.update import Moved, run_at
from topkast_func.training.watch import Watch
from topkast_func.training.ways import way_of
from topkast_func.training.whole import is_inferred
from topkast_func.turns import EVERYTHING, RANDOM_NUMBERS, in_turn
from topkast_func.types import LossFn, Model, Tensors

TrainStep: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]

Shapes: TypeAlias = tuple[tuple[str, torch.Size], ...]
"""Shapes by name, of sparse parameters."""


def built(
    group: Ranks | None,
    model: Model,
    loss_fn: LossFn,
    config: TopKastConfig,
    optimizer: Optimizer,
    compile: bool | Mapping[str, Any],
    engine: EngineName,
    samples: Samples | None,
    shard: str | None,
) -> tuple[TrainStep, dict[str, Any]]:
    """Put a step together, without the other ranks; see `make_train_step`.

    Args:
        group: The processes that train together; None for this one alone.
        model: The model.
        loss_fn: Its loss.
        config: The configuration.
        optimizer: The optimiser.
        compile: Whether, and how, it is compiled.
        engine: Who computes sparse products.
        samples: How much a batch counts.
        shard: How the ranks share a state.

    Returns:
        The step, and what of it must be alike on all ranks, by what it is called.

    Raises:
        TypeError: See `make_train_step`.
        ValueError: See `make_train_step`, but for what ranks differ in.
    """
    check_engine(engine)
    check_type("config", config, TopKastConfig)
    check_optimizer(optimizer)
    check_callable("model", model)
    check_loss_fn(loss_fn, model)
    model, loss_fn = as_plain(model), uncompiled(loss_fn)
    check_uncompiled(model)
    options = described(compile) if isinstance(compile, Mapping) else compile
    given = {"optimizer": repr(optimizer), "engine": engine, "compile": options, "shard": shard}
    ranks = data_parallel(group, samples, shard, model)
    criterion, way = loss_fn, way_of(ranks, config)
    loss_fn = ranks.fed(criterion)
    layers = alone_with(model, partial(stand_ins, model, engine))
    check = alone_with(model, partial(agreement, model, config, optimizer))
    schedule = config.schedule

    compiler = compiler_of(compile, required=ranks.several)

    @cache
    def run_from(start: int, hooked: Hashable, sparse: Shapes) -> Callable[..., Moved]:
        terms = terms_of(dict(sparse), config, start)
        return compiler(way.update_of(model, loss_fn, config, terms, optimizer, layers, ranks))

    @cache
    def gradients_from(start: int, hooked: Hashable) -> Callable[[TrainState, Any], Tensors]:
        return compiler(gradients_of(model, loss_fn))

    def gradients(state: TrainState, batch: Any, hooked: Hashable) -> Tensors:
        last = max(int(state.step) - 1, 0)
        run = gradients_from(schedule.stage(last), hooked)
        return ranks.mean(run(state, batch))

    parts = parts_of(model)
    first = RANDOM_NUMBERS if compile is False else EVERYTHING
    own, draws = claim(parts), Draws(first, ranks.rank, not ranks.several)
    trials, whole = Trials(model, loss_fn), Watch()

    def anew(state: TrainState, batch: Any, call: Call) -> TrainState:
        work = partial(gradients, state, batch, call.hooked)
        read = partial(draws.run, (call.kind, "gradients"), state, work)
        after = refreshed_if_finite(state, config, read, way.refresh)
        whole.follow(state, after)
        return after

    def stepped(state: TrainState, batch: Any, call: Call) -> tuple[TrainState, StepMetrics]:
        before = anew(state, batch, call) if call.is_due else state
        refreshed, state = before is not state, before
        patterns = state.weights.patterns
        lent = {i: layer for i, layer in enumerate(layers) if layer.needed(patterns)}

        def step() -> Moved:
            shapes = state.weights.shapes()
            sparse = tuple((name, shapes[name]) for name in state.weights.sparse_names)
            run = run_from(schedule.stage(int(state.step)), call.hooked, sparse)
            with standing_in(lent.values()):
                return run_at(run, [*lent], state, batch, call.rate, optimizer, ranks.share)

        moved, numbers, aux = draws.run(call.kind, state, step)
        after = anew(moved, batch, call) if call.ends else moved
        aux = ranks.agreed(aux, int(state.step))
        told = torch.tensor(refreshed or after is not moved, device="cpu")
        return after, StepMetrics(*numbers, told, *(aux or ((),)))

    def in_its_turn(
        state: TrainState, batch: Any, call: Call, look: Hashable
    ) -> tuple[TrainState, StepMetrics]:
        check(state, call.parts, look)
        with trials.around(call.mode, state, batch) as beside:
            ranks.expect(call.mode, int(state.step), beside)
            return stepped(state, batch, call)

    @torch.inference_mode(False)
    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        check_fields(state)
        if is_mapped("a step", (state, batch)):
            ensemble: tuple[TrainState, StepMetrics] = mapped(train_step, state, batch)
            return ensemble
        look = whole.look(state)
        state = ordinary(state) if is_inferred(state) else state
        state, batch = way.part(state), ordinary(batch)
        call = call_of(model, criterion, config, optimizer, state, batch, compile is not False)
        work = partial(as_written, call.parts, partial(in_its_turn, state, batch, call, look))
        turn = partial(in_turn, own | draws.claims(call.kind), work)
        compared, due = partial(way.compared, state), call.is_due or call.ends
        kind: dict[str, Any] = {"modes": call.mode, "sizes": call.sizes}
        if ranks.several:
            rates = [rate for rate in tree_leaves(call.rate) if rate.device.type == "cpu"]
            kind["learning rate"] = [*map(float, rates)]
        with one_report():
            return ranks.take_part(state, batch, turn, compared=compared, due=due, **kind)

    vars(train_step)["config"] = config
    return train_step, {"config": described(vars(config)), **given, **about(model)}
