"""Choosing A and B of a state anew."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeAlias

import torch

from topkast_func.checks import check_type
from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import shared_among_all
from topkast_func.entry import entered
from topkast_func.masks import counts_among, masks_at
from topkast_func.ranking import NaNParameterError
from topkast_func.storage.weights import Weights
from topkast_func.training.ensembles import is_mapped, mapped
from topkast_func.training.fits_config import check_gradients, check_refresh, is_of_stage
from topkast_func.training.optim import Optimizer
from topkast_func.training.readout import powered
from topkast_func.training.state import TrainState, check_at_hand, check_state, ordinary
from topkast_func.training.whole import is_inferred
from topkast_func.types import Masks, Params, Tensors
from topkast_func.warn import warn_caller

Choice: TypeAlias = tuple[Tensors, dict[str, Masks]]
"""θ by name, with what entered A as it starts, and the sets."""


@torch.inference_mode(False)
def refresh(
    state: TrainState, config: TopKastConfig, gradients: Params | None = None
) -> TrainState:
    """Choose A and B anew; from step ``config.explore_until`` on, let B be A.

    An optimiser slot stays with its weight; an entry that newly enters B starts at zero. Under
    `torch.vmap` it does so for each member of an ensemble, of states that were stacked.

    Args:
        state: The state; it is not written to.
        config: The configuration.
        gradients: What `dense_gradients` returns, for a method that reads it (`rigl`).

    Returns:
        The state with its new sets.

    Raises:
        TypeError: ``state`` is no state, ``config`` no configuration, or ``gradients`` are no
            dense tensors of real floating-point numbers by name.
        ValueError: The method reads gradients and there are none, they are of other parameters or
            shapes or without values, or the configuration has other sparse parameters, other
            blocks or another exponent, or a method that is to train densely.
        NaNParameterError: A sparse parameter holds NaN, or a gradient that is read is not finite; a
            ValueError too.
        RuntimeError: It is differentiated.
        torch.OutOfMemoryError: The device has too little memory; the text says the way on.
    """
    check_state(state)
    check_type("config", config, TopKastConfig)
    if is_mapped("refresh", (state, gradients)):
        ensemble: TrainState = mapped(lambda s, g: refresh(s, config, g), state, gradients)
        return ensemble
    state = ordinary(state) if is_inferred(state) else state
    check_at_hand(state)
    check_refresh(state, config)
    gradients = gradients if config.method.reads_gradient else None
    if gradients is not None:
        check_gradients(state, gradients)
    try:
        return refreshed(state, config, gradients)
    except torch.OutOfMemoryError as reason:
        raise torch.OutOfMemoryError(TOO_LARGE) from reason


NO_ROOM = (
    "the device has too little memory to choose sets anew, which takes up to 40 bytes for each "
    "entry of the largest weight"
)
TOO_LARGE = (
    f"{NO_ROOM}; the state is as it was. Let θ rest, and be ranked, on the host: "
    "save the state and load(..., theta_device='cpu'), or begin with init_state(..., "
    "theta_device='cpu')"
)


@torch.no_grad()
def refreshed(
    state: TrainState,
    config: TopKastConfig,
    gradients: Params | None,
    agreed: Callable[[Callable[[], Choice]], Choice] = lambda choose: choose(),
) -> TrainState:
    """Choose A and B anew; see `refresh`.

    Args:
        state: See `refresh`.
        config: See `refresh`.
        gradients: See `refresh`.
        agreed: ``agreed(choose)`` to what ``choose()`` returns, of all parameters where it returns
            the sets of some.

    Returns:
        The state with its new sets.
    """
    weights = state.weights
    choose = partial(
        chosen_anew,
        weights.dense(),
        weights.sparse_names,
        weights.masks,
        config,
        step=int(state.step),
        seed=int(state.mask_seed),
        exponents=state.exponents,
        gradients=gradients,
    )
    dense, masks = agreed(choose)
    sizes = sizes_after(state.weights, config, int(state.step))
    weights, slots = state.weights.reindexed(dense, masks, state.optimizer.slots, sizes)
    return state._replace(weights=weights, optimizer=state.optimizer._replace(slots=slots))


def sizes_after(weights: Weights, config: TopKastConfig, step: int) -> dict[str, tuple[int, int]]:
    """Return |A| and |B| by name after a refresh, which follow without counting."""
    if config.schedule.settled(step):
        return {name: (active, active) for name, (active, _) in weights.sizes().items()}
    shapes = weights.shapes()
    return counts_among({name: shapes[name] for name in weights.sparse_names}, config, step)


def chosen_anew(
    raw: Tensors,
    names: Iterable[str],
    sets: Callable[[], Mapping[str, Masks]],
    config: TopKastConfig,
    *,
    step: int,
    seed: int,
    exponents: Params | None = None,
    gradients: Params | None = None,
) -> tuple[Tensors, dict[str, Masks]]:
    """Choose the sets of a step, and give what newly enters A its start; see `refresh`.

    Args:
        raw: θ by name, or φ where it is trained; on the meta device where another process chooses.
        names: Names of the sparse parameters.
        sets: ``sets()`` to the sets as they are; called only where the new ones depend on them.
        config: The configuration.
        step: Number of the step.
        seed: Seed of the methods that draw.
        exponents: Exponents of powerpropagation by name; none where θ itself is trained.
        gradients: Gradients of the loss at α by name, for the methods that read them.

    Returns:
        ``raw`` with what entered A as it starts, and the new sets.

    Raises:
        ValueError: See `refresh`.
        NaNParameterError: See `refresh`; a ValueError too.
    """
    exponents = exponents or {}
    stays = config.schedule.settled(step)
    old = sets() if stays or config.method.reads_sets else {}
    old = {name: masks for name, masks in old.items() if not raw[name].is_meta}
    if stays:
        return raw, {name: Masks(m.forward, m.forward.clone()) for name, m in old.items()}
    theta = powered(raw, exponents)
    shares = shared_among_all({name: theta[name].shape for name in names}, config, step)
    allocations = {name: share for name, share in shares.items() if not theta[name].is_meta}
    new = masks_at(theta, allocations, config, step=step, seed=seed, old=old, gradients=gradients)
    if old:
        raw = raw | {
            name: entered(
                name,
                raw[name],
                old[name],
                new[name],
                config.method.enters_at,
                block_shape=config.block_shape,
                block_norm=config.block_norm,
                exponent=float(exponents.get(name, 1.0)),
            )
            for name in new
        }
    return raw, new


def refreshes_around(
    state: TrainState, config: TopKastConfig, optimizer: Optimizer
) -> tuple[bool, bool]:
    """Return whether a step begins, and whether it ends, by choosing the sets anew.

    Args:
        state: The state before it.
        config: The configuration.
        optimizer: The optimiser; only some of its calls may move the weights.

    Returns:
        Whether a refresh is due before the step, unless the one before has chosen the sets of a
        new stage; and whether it is the last step of a stage.
    """
    step, calls, schedule = int(state.step), int(state.optimizer.step), config.schedule
    chosen = step in schedule.starts and is_of_stage(state.weights, config, step)
    due = calls % optimizer.every == 0 and schedule.refreshes_at(step) and not chosen
    ends = (calls + 1) % optimizer.every == 0 and step + 1 in schedule.starts
    return due, ends


def refreshed_if_finite(
    state: TrainState,
    config: TopKastConfig,
    gradients: Callable[[], Tensors],
    refresh: Callable[[TrainState, TopKastConfig, Params | None], TrainState] = refresh,
) -> TrainState:
    """Return the state with new sets; where NaN forbids that, warn and return it as it is.

    Args:
        state: The state.
        config: The configuration.
        gradients: Returns what `refresh` takes, for a method that reads it.
        refresh: What chooses them.

    Returns:
        The state.
    """
    try:
        return refresh(state, config, gradients() if config.method.reads_gradient else None)
    except NaNParameterError as reason:
        warn_caller(f"no refresh before step {int(state.step)}: {reason}")
        return state
