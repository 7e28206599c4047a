"""The stateless training step: state and batch in, state and metrics out."""

from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from topkast_func.checks import check_callable, check_type
from topkast_func.compiling import one_report
from topkast_func.config import TopKastConfig
from topkast_func.config.as_json import described
from topkast_func.distributed.batches import Samples
from topkast_func.distributed.joined import data_parallel
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
from topkast_func.training.state import TrainState, check_state, ordinary
from topkast_func.training.trial import Trials
from topkast_func.training.update import Moved, run_at
from topkast_func.training.ways import way_of
from topkast_func.turns import EVERYTHING, RANDOM_NUMBERS, in_turn
from topkast_func.types import LossFn, Model, Tensors

TrainStep: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]

Shapes: TypeAlias = tuple[tuple[str, torch.Size], ...]
"""Shapes by name, of sparse parameters."""


def make_train_step(
    model: Model,
    loss_fn: LossFn,
    config: TopKastConfig,
    optimizer: Optimizer,
    *,
    compile: bool | Mapping[str, Any] = True,
    engine: EngineName = "auto",
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    samples: Samples | None = None,
    shard: Literal["owners"] | None = None,
) -> TrainStep:
    """Build ``train_step(state, batch) -> (state, metrics)``.

    The step is pure: it writes to none of its arguments and not to the module. Its first call in
    each mode of the module also runs the forward pass twice on copies, to see that it is pure and
    that the loss depends on what is trained; it warns where that does not do the same again.
    Before step t it chooses A and B anew when ``config.refresh_every`` divides t > 0, and makes B
    the forward set at t = ``config.explore_until``; where another sparsity is in force from t on,
    the step before ends by choosing them, so that t steps reach it. The update,
    momentum and weight decay included, is restricted to B. The same state and batch give the same
    result, dropout included: random numbers follow from the state's seed and step. There is one
    graph for each stage of sparsities that change over time.

    Under `torch.vmap` it makes the steps of an ensemble, of states that were stacked, batches, or
    both, one member after another, each as it would be alone.

    Threads may share a step, a module, or parts of modules, and get what each would get alone:
    they take turns where they do, where a step draws random numbers, and where it compiles. What
    they must leave to the steps meanwhile is a module of theirs (to run it beside, let a copy of it
    load `forward_params`) and torch's own generators (give a ``torch.Generator`` to whatever else
    draws). A loss function is not to wait for a thread that makes steps. Where other programs use
    the cores, call ``torch.set_num_threads(1)``: threads that wait for each other while they are
    not scheduled can make a step many times slower.

    A loss that is NaN is returned as it is; θ then holds NaN, and a refresh that comes due
    keeps the sets and warns.

    With a process group each of its ranks calls the step with the same state and a batch of its
    own, and gets the state, the loss and the metrics that one process would get with all batches
    together: the loss is to be a mean over the samples of a batch, gradients are averaged with
    the samples of each rank as weights, and a rank without data takes part with an empty batch.
    What is sent is one number for each value that is stored, those of B and of dense parameters.
    Of ``aux`` floating 0-d tensors are averaged, under the same keys in the same order on all
    ranks; others are those of the rank, where its batch is empty of two rows of zeros. Floating
    buffers that are saved with the module, such as running statistics, are averaged; others must be
    the same on all ranks. Dropout differs by rank, the sets never do. That all ranks hold the same
    state is checked at the first step, at a refresh, where a state is not the one that the step
    before returned, and after a hundred steps without such a check.

    With ``shard="owners"`` one rank owns each tensor: it alone has slots and θ outside A, and sends
    α and the sets to the others. Where a rank would have over a tenth more entries than its share,
    its largest tensor is split: each rank has equal parts of θ and of the slots, the sets are those
    of the whole. Not split are sparse tensors with blocks, N:M sets, ``penalty="group_l2"`` or a
    method that does not rank by magnitude alone (of those here `topkast`, `gmp` and `ste` do):
    the largest then bounds what is spared, and `plan` names it. The step takes a whole state or the
    part of its rank, and returns the part: `forward_params` and `masks_of` read it, `save_sharded`
    writes it, `gather` returns the whole. θ outside B is checked as often as without owners; what
    a step moves, values and slots, is not: copies of α are written anew from those of the owners
    in each step, so that a bit that flips there is seen by nobody.

    Args:
        model: A module, in the training or evaluation mode it has at the call, or a pure
            function ``apply(params, *inputs)``. What torch.compile returned is taken as it was
            before, as the step is compiled as a whole.
        loss_fn: ``loss_fn(apply, batch)`` to a 0-d tensor, or to a pair (0-d tensor, aux): aux, a
            tree of tensors such as logits or an accuracy, comes back as ``metrics.aux``. Numbers
            that change are tensors of the batch: others are compiled in.
        config: The configuration.
        optimizer: The optimiser.
        compile: True for one graph per shape of batch by `torch.compile`, its own options as
            a mapping, or False to run eager.
        engine: Who computes sparse products in compact storage: "numba" on a CPU, "triton" on a
            GPU, "dense", "reference" or "torch_sparse", or "auto" for the fastest of each layer.
        process_group: The processes that train together, as `torch.distributed` has them; all
            call this function and the step, from one thread. Its time-out says how long one
            waits for another.
        mesh: A device mesh of one axis in place of the group.
        samples: ``samples(batch)``, how much a batch counts: how many tokens a loss is the mean
            of, say. None for the length of the first axis of its tensors.
        shard: "owners" to spare memory, in compact storage; None for all of a state on each rank.
            What an optimiser of your own computes of several entries together, such as a norm, is
            then of those of the rank; `clip_by_global_norm` clips by all.

    Returns:
        The step. It raises TypeError where the loss is no 0-d tensor, ValueError where the
        state is of another model or optimiser, a parameter is trained that requires no gradient
        or the other way round, the forward pass changes a parameter or its inputs, the loss does
        not depend on what is trained alone, or no rank has a sample, RuntimeError where the model
        breaks the graph, the step is differentiated, another rank is lost, elsewhere or holds
        another state, and whatever the model itself raises; the caller's state is whole after any
        of these.

    Raises:
        TypeError: The model or the loss function cannot be called, or the latter is one of torch
            itself, ``config`` is no configuration, or the optimiser none of this library.
        ValueError: There is no such engine, or a part of the model is what torch.compile returned;
            or ranks differ in configuration, model, optimiser or torch, the mesh has several axes,
            or a part of the model is SyncBatchNorm.
        RuntimeError: Another rank is lost.

    Example:
        >>> from topkast_func import init_state, sgd
        >>> model = torch.nn.Linear(4, 1)
        >>> config, optimizer = TopKastConfig(), sgd(lr=0.1)
        >>> state = init_state(model, config, optimizer)
        >>> mse = lambda apply, batch: (apply(batch) ** 2).mean()
        >>> train_step = make_train_step(model, mse, config, optimizer, compile=False)
        >>> state, metrics = train_step(state, torch.ones(8, 4))
        >>> int(state.step), metrics.loss.shape
        (1, torch.Size([]))
    """
    check_engine(engine)
    check_type("config", config, TopKastConfig)
    check_optimizer(optimizer)
    check_callable("model", model)
    check_loss_fn(loss_fn, model)
    model, loss_fn = as_plain(model), uncompiled(loss_fn)
    check_uncompiled(model)
    options = described(compile) if isinstance(compile, Mapping) else compile
    given = {"optimizer": repr(optimizer), "engine": engine, "compile": options}
    about = {"config": described(vars(config)), **given}
    ranks = data_parallel(process_group, mesh, samples, shard, model, about)
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
    trials = Trials(model, loss_fn)

    def anew(state: TrainState, batch: Any, call: Call) -> TrainState:
        work = partial(gradients, state, batch, call.hooked)
        read = partial(draws.run, (call.kind, "gradients"), state, work)
        return refreshed_if_finite(state, config, read, way.refresh)

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
                return run_at(run, [*lent], state, batch, optimizer, ranks.share)

        moved, numbers, aux = draws.run(call.kind, state, step)
        after = anew(moved, batch, call) if call.ends else moved
        aux = ranks.agreed(aux, int(state.step))
        told = torch.tensor(refreshed or after is not moved, device="cpu")
        return after, StepMetrics(*numbers, told, *(aux or ((),)))

    def in_its_turn(state: TrainState, batch: Any, call: Call) -> tuple[TrainState, StepMetrics]:
        check(state, call.parts)
        with trials.around(call.mode, state, batch):
            ranks.expect(int(state.step))
            return stepped(state, batch, call)

    @torch.inference_mode(False)
    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        check_state(state)
        if is_mapped("a step", (state, batch)):
            ensemble: tuple[TrainState, StepMetrics] = mapped(train_step, state, batch)
            return ensemble
        state = ordinary(state) if state.step.is_inference() else state
        state, batch = way.part(state), ordinary(batch)
        call = call_of(model, criterion, config, optimizer, state, batch, compile is not False)
        work = partial(as_written, call.parts, partial(in_its_turn, state, batch, call))
        turn = partial(in_turn, own | draws.claims(call.kind), work)
        compared, due = partial(way.compared, state), call.is_due or call.ends
        kind = {"modes": call.mode, "sizes": call.sizes}
        with one_report():
            return ranks.take_part(state, batch, turn, compared=compared, due=due, **kind)

    vars(train_step)["config"] = config
    return train_step
