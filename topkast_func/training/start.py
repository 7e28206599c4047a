"""How training starts: weights are copied, sets are chosen, slots are made."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from topkast_func.checks import check_count, check_type
from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import given_sparsity
from topkast_func.config.selection import check_present, matches
from topkast_func.masks import compute_masks
from topkast_func.model.alone import alone_with, uncompiled
from topkast_func.model.layers import kernel_weights
from topkast_func.model.modules import buffers, frozen, tensors_of, ties, trainable
from topkast_func.powerprop import check_moves, phi_of
from topkast_func.sparsity import ByPattern
from topkast_func.storage.compact import compact
from topkast_func.storage.dense import DenseWeights
from topkast_func.training.agreement import COMPACT
from topkast_func.training.fits_config import check_masks
from topkast_func.training.optim import Optimizer, check_optimizer
from topkast_func.training.state import Storage, TrainState, Weights
from topkast_func.types import Masks, Params, Tensors


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
) -> TrainState:
    """Start training: copy the weights, choose A and B, make zero slots.

    Args:
        model_or_params: A module, of which the parameters that require a gradient are
            trained, or weights by name.
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

    Returns:
        The state before step 0. It shares no memory with the arguments.

    Raises:
        TypeError: ``master`` is no dtype, a leaf is no plain floating-point or complex tensor (see
            `compute_masks`), ``config`` is no configuration, ``optimizer`` none of this library,
            or ``masks`` are not `Masks` of bool.
        ValueError: There is nothing to train, a leaf is empty or without values (on the meta
            device, of a lazy module), the configuration does not fit, a tied weight is given two
            sparsities, ``masks`` are not what the configuration asks for, ``theta_device`` is
            given for dense storage, compact storage is asked for an optimiser that is not
            elementwise, a parameter that is to be trained by powerpropagation is zero
            everywhere, or ``master`` is another dtype.
        NaNParameterError: A leaf holds NaN; a ValueError too.
    """
    if storage not in ("compact", "dense"):
        raise ValueError(f"storage must be 'compact' or 'dense', got {storage!r}")
    if storage == "dense" and theta_device is not None:
        raise ValueError("theta_device is for compact storage: dense storage computes with θ")
    check_type("config", config, TopKastConfig)
    check_optimizer(optimizer)
    if storage == "compact" and not optimizer.elementwise:
        raise ValueError(COMPACT.format(optimizer))
    model = uncompiled(model_or_params)
    seed = check_count("seed", seed, 0)
    mask_seed = seed if mask_seed is None else check_count("mask_seed", mask_seed, 0)
    _check_master(master)
    seeds = (seed, mask_seed)
    begin = partial(
        _first_state, model, config, optimizer, storage, theta_device, seeds, masks, master
    )
    return alone_with(model, begin)


def _first_state(
    model: nn.Module | Params,
    config: TopKastConfig,
    optimizer: Optimizer,
    storage: Storage,
    theta_device: torch.device | str | None,
    seeds: tuple[int, int],
    masks: Mapping[str, Masks] | None,
    master: torch.dtype | None,
) -> TrainState:
    params = trainable(model) if isinstance(model, nn.Module) else model
    if not params:
        raise ValueError("there is no parameter that requires a gradient")
    for name, tensor in tensors_of(model).items():
        check_present(name, tensor)
    check_ties(model, config)
    if masks is None:
        masks = compute_masks(params, config, seed=seeds[1])
    else:
        check_masks(params, masks, config)
        masks = {n: Masks(*(m.to(params[n].device, copy=True) for m in masks[n])) for n in masks}
    params = {name: theta.detach().as_subclass(Tensor) for name, theta in params.items()}
    kinds = {name: theta.dtype for name, theta in params.items()}
    if master is not None:
        params = {n: p.to(torch.promote_types(p.dtype, master)) for n, p in params.items()}
    exponents: Tensors = {}
    if config.powerprop > 1.0:
        names = given_sparsity(params, config)
        for name in names:
            check_moves(name, params[name], config.powerprop)
        exponent = torch.tensor(config.powerprop, dtype=torch.float64, device="cpu")
        exponents = {name: exponent.clone() for name in names}
        params = {**params, **{n: phi_of(params[n], config.powerprop) for n in names}}
    weights: Weights
    if storage == "compact":
        matrices = [name for name, theta in params.items() if theta.ndim == 2]
        layers = kernel_weights(model) if isinstance(model, nn.Module) else matrices
        weights = compact(params, masks, layers, config.block_shape, theta_device)
    else:
        weights = DenseWeights(_copied(params), masks)
    return TrainState(
        step=torch.zeros((), dtype=torch.int64, device="cpu"),
        seed=torch.tensor(seeds[0], device="cpu"),
        mask_seed=torch.tensor(seeds[1], device="cpu"),
        weights=weights,
        buffers=buffers(model),
        frozen=_copied(frozen(model)),
        optimizer=optimizer.init(weights.values()),
        exponents=exponents,
        narrow={
            n: p.new_empty(0, dtype=kinds[n]) for n, p in params.items() if p.dtype != kinds[n]
        },
    )


def _check_master(master: object) -> None:
    if master is None:
        return
    if not isinstance(master, torch.dtype):
        raise TypeError(f"master must be torch.float32, torch.float64 or None, got {master!r}")
    if master not in (torch.float32, torch.float64):
        raise ValueError(f"master must be torch.float32, torch.float64 or None, got {master}")


def check_ties(model: object, config: TopKastConfig) -> None:
    """Check that no pattern speaks of a tied weight of a module under its second name alone.

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


def _copied(tensors: Params) -> Tensors:
    return {name: tensor.detach().as_subclass(Tensor).clone() for name, tensor in tensors.items()}
