"""The stateless training step: state and batch in, state and metrics out."""

from collections.abc import Mapping
from typing import Any, Literal

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from topkast_func.config import TopKastConfig
from topkast_func.distributed.batches import Samples
from topkast_func.distributed.joined import made_alike
from topkast_func.distributed.ranks import ranks_of
from topkast_func.kernels.engines import EngineName
from topkast_func.training.build import TrainStep, built
from topkast_func.training.optim import Optimizer
from topkast_func.types import LossFn, Model


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
            waits for another. A process that was started alone trains as without a group.
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
            the group has one alone of several processes, or a part of the model is SyncBatchNorm.
            What is wrong on one rank is an error on all.
        RuntimeError: Another rank is lost.

    Example:
        >>> import torch
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
    ranks = ranks_of(process_group, mesh)

    def make() -> tuple[TrainStep, dict[str, Any]]:
        if process_group is not None and mesh is not None:
            raise ValueError("process_group and mesh are both given: one says which ranks train")
        return built(ranks, model, loss_fn, config, optimizer, compile, engine, samples, shard)

    return made_alike(ranks, "in make_train_step", make)
