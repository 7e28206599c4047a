"""How training starts: weights are copied, sets are chosen, slots are made."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from topkast_func.checks import check_count, check_type
from topkast_func.config import TopKastConfig
from topkast_func.config.selection import matches, warn_of_other_names
from topkast_func.devices import check_device
from topkast_func.model.alone import alone_with, as_plain
from topkast_func.model.modules import buffers_of, check_parameters, frozen, tensors_of, ties
from topkast_func.reading import check_numbers
from topkast_func.sparsity import ByPattern
from topkast_func.training.agreement import COMPACT
from topkast_func.training.first_weights import Manner, check_master, first_weights, trained
from topkast_func.training.materialize import Materialize, Source
from topkast_func.training.optim import Optimizer, check_optimizer, started
from topkast_func.training.state import Storage, TrainState
from topkast_func.turns import RANDOM_NUMBERS
from topkast_func.types import Masks, Params


@torch.inference_mode(False)
def init_state(
    model_or_params: nn.Module | Params,
    config: TopKastConfig,
    optimizer: Optimizer,
    *,
    storage: Storage = "compact",
    theta_device: torch.device | str | None = None,
    seed: int = 0,
    mask_seed: int | None = None,
    masks: Mapping[str, Masks] | None = None,
    master: torch.dtype | None = None,
    materialize: Materialize | None = None,
) -> TrainState:
    """Start training: copy the weights, choose A and B, make zero slots.

    Args:
        model_or_params: A module, of which the parameters that require a gradient are
            trained, or weights by name. Both are θ, under powerpropagation too, which turns them
            into φ. To go on from a module that `sparsify` has made sparse, let a plain one load
            ``sparsifier.dense_params()``, or give that.
        config: The configuration.
        optimizer: The optimiser.
        storage: "compact" keeps values, slots and gradients of B, and θ apart; "dense" keeps
            θ and masks. The trajectories agree to rounding.
        theta_device: Where θ rests between refreshes in compact storage, such as "cpu"; None
            for the device of the weights.
        seed: Seed of the random numbers that the model draws (dropout), from 0 to 2⁶³ − 1.
        mask_seed: Seed of the methods that draw sets, likewise; None for ``seed``.
        masks: Sets to start from (a lottery ticket, SNIP) in place of those that the method would
            choose, by the name of each sparse parameter; a refresh goes on from them.
        master: `torch.float32` or `torch.float64`: θ of the parameters of a narrower dtype is kept,
            penalised and moved in this one, and the model computes with α rounded to theirs, which
            is what `forward_params` returns; gradients pass through the rounding. None keeps θ in
            the dtype of each parameter, where an update below half its spacing is lost.
        materialize: ``materialize(name, tensor)`` to the values of a tensor that is on the meta
            device, parameter or buffer, in its shape and dtype: an initialiser, or what
            `from_safetensors` returns. It is called for one at a time, and the next is asked for
            when the values of the last are stored, so that a start takes the memory of the state
            and of the largest tensor. Random numbers that torch draws in it follow from ``seed``
            and the name alone, on any number of ranks; the caller's stay as they are.

    Returns:
        The state before step 0. It shares no memory with the arguments.

    Raises:
        TypeError: ``master`` is no dtype, ``materialize`` no function or one that returns no
            tensor, a leaf is no plain floating-point or complex tensor (see
            `compute_masks`), ``config`` is no configuration, ``optimizer`` none of this library,
            or ``masks`` are not `Masks` of bool.
        ValueError: There is nothing to train, a leaf is empty or without values (on the meta
            device and ``materialize`` not given, of a lazy module), ``materialize`` is given and
            all have values, or returns another shape or dtype, the configuration does not fit, a
            tied weight is given two sparsities, ``masks`` are not what the configuration asks for,
            ``theta_device`` is given for dense storage, or is no device with values, compact
            storage is asked for an optimiser that is not elementwise, a parameter that is to be
            trained by powerpropagation is zero everywhere, or ``master`` is another dtype.
        NaNParameterError: A leaf holds NaN; a ValueError too.
        RuntimeError: Nothing has numbers, under `FakeTensorMode`.

    Example:
        >>> from topkast_func import sgd
        >>> model = nn.Linear(100, 10, device="meta")
        >>> draw = lambda name, tensor: torch.empty_like(tensor, device="cpu").normal_(std=0.02)
        >>> state = init_state(model, TopKastConfig(), sgd(lr=0.1), materialize=draw)
        >>> state.weights.sizes()
        {'weight': (100, 200)}
    """
    check_numbers("init_state")
    if storage not in ("compact", "dense"):
        raise ValueError(f"storage must be 'compact' or 'dense', got {storage!r}")
    if storage == "dense" and theta_device is not None:
        raise ValueError("theta_device is for compact storage: dense storage computes with θ")
    check_device("theta_device", theta_device)
    check_type("config", config, TopKastConfig)
    check_optimizer(optimizer)
    if storage == "compact" and not optimizer.elementwise:
        raise ValueError(COMPACT.format(optimizer))
    model = as_plain(model_or_params)
    seed = check_count("seed", seed, 0)
    mask_seed = seed if mask_seed is None else check_count("mask_seed", mask_seed, 0)
    check_master(master)
    manner = Manner(config, storage, theta_device, mask_seed, masks, master)
    begin = partial(_first_state, model, optimizer, manner, seed, materialize)
    return alone_with(model, begin, frozenset() if materialize is None else RANDOM_NUMBERS)


def _first_state(
    model: nn.Module | Params,
    optimizer: Optimizer,
    manner: Manner,
    seed: int,
    materialize: Materialize | None,
) -> TrainState:
    check_parameters(model)
    params, layers = trained(model)
    check_ties(model, manner.config)
    source = Source({**params, **tensors_of(model)}, materialize, seed)
    weights, powers = first_weights(params, layers, source, manner)
    warn_of_other_names(params, manner.config)
    values = weights.values
    exponent = torch.tensor(manner.config.powerprop, dtype=torch.float64, device="cpu")
    return TrainState(
        step=torch.zeros((), dtype=torch.int64, device="cpu"),
        seed=torch.tensor(seed, device="cpu"),
        mask_seed=torch.tensor(manner.mask_seed, device="cpu"),
        weights=weights,
        buffers=source.copied(buffers_of(model)),
        frozen=source.copied(frozen(model)),
        optimizer=started(optimizer, values),
        exponents={name: exponent.clone() for name in powers},
        narrow={
            name: values[name].new_empty(0, dtype=tensor.dtype)
            for name, tensor in params.items()
            if tensor.dtype != values[name].dtype
        },
    )


def check_ties(model: object, config: TopKastConfig) -> None:
    """Check that no pattern names a tied weight of a module by its second name alone.

    Args:
        model: A module, or anything else.
        config: The configuration.

    Raises:
        ValueError: A pattern matches the second name of a weight and not the first, or gives
            the two different numbers.
    """
    for name, own in ties(model).items():
        for field in ("sparse", "keep_dense"):
            globs = getattr(config, field)
            if isinstance(globs, tuple) and matches(name, globs) and not matches(own, globs):
                raise ValueError(
                    f"{name!r} is tied to {own!r}, which {field}={globs} does not match: "
                    f"name {own!r} in its place, or match neither"
                )
        for field in ("forward_sparsity", "backward_sparsity", "allocation"):
            numbers = getattr(config, field)
            if isinstance(numbers, ByPattern):
                given, under = (
                    [numbers[p] for p in numbers if numbers.matching(p, [n])] for n in (own, name)
                )
                if under and {*under} != {*given}:
                    raise ValueError(
                        f"{name!r} is tied to {own!r}: {field} gives them {under} and "
                        f"{given or 'nothing'}; name {own!r} alone"
                    )
