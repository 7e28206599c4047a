"""The state of training: what it holds, how it starts, and its refresh."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from topkast_func.checks import check_count
from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import given_sparsity, shared_among_all
from topkast_func.config.selection import check_present
from topkast_func.entry import entered
from topkast_func.masks import compute_masks, counts_among, masks_at
from topkast_func.model.alone import alone_with, uncompiled
from topkast_func.model.layers import kernel_weights
from topkast_func.model.modules import buffers, frozen, tensors_of, ties, trainable
from topkast_func.powerprop import check_moves, phi_of, theta_of
from topkast_func.sparsity import ByPattern
from topkast_func.storage.compact import CompactWeights, compact
from topkast_func.storage.dense import DenseWeights
from topkast_func.training.agreement import COMPACT, check_masks, check_refresh
from topkast_func.training.brief import brief
from topkast_func.training.optim import Optimizer, OptimizerState, check_optimizer
from topkast_func.types import Masks, Params, Tensors

Weights: TypeAlias = CompactWeights | DenseWeights
"""The weights of a state, in either storage."""

Tree = TypeVar("Tree")

Storage: TypeAlias = Literal["compact", "dense"]


class TrainState(NamedTuple):
    """All that the next step needs, as tensors.

    Attributes:
        step: Number t of the next update, int64, 0-d, on the CPU. Where the optimiser accumulates
            gradients it stays until they have made one; see `multi_steps`.
        seed: Seed of the random numbers that the model draws, int64, 0-d, on the CPU.
        mask_seed: Seed of the sets that a method draws, int64, 0-d, on the CPU.
        weights: θ and its sets, in the form of the storage; read them with `dense_params`,
            `forward_params` and `masks_of`.
        buffers: Buffers of the module by name, such as BatchNorm statistics.
        frozen: Parameters of the module that require no gradient, by name.
        optimizer: State of the optimiser.
        exponents: By name the exponent a, float64, 0-d, on the CPU, of each parameter that is
            trained as φ of powerpropagation; empty where θ itself is trained.
        narrow: By name an empty tensor of the dtype that the forward pass computes in, for each
            parameter of which θ is kept in a wider one; see ``master`` of `init_state`.
    """

    step: Tensor
    seed: Tensor
    mask_seed: Tensor
    weights: Weights
    buffers: Tensors
    frozen: Tensors
    optimizer: OptimizerState
    exponents: Tensors
    narrow: Tensors

    def __repr__(self) -> str:
        """Print what it consists of, in a few lines."""
        return brief(self)


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
            `compute_masks`), ``optimizer`` is none of this library, or ``masks`` are not `Masks`
            of bool.
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


@torch.inference_mode(False)
def refresh(
    state: TrainState, config: TopKastConfig, gradients: Params | None = None
) -> TrainState:
    """Choose A and B anew; from step ``config.explore_until`` on, let B be A.

    An optimiser slot stays with its weight; an entry that newly enters B starts at zero.

    Args:
        state: The state; it is not written to.
        config: The configuration.
        gradients: What `dense_gradients` returns, for a method that reads it (`rigl`).

    Returns:
        The state with its new sets.

    Raises:
        ValueError: The method reads gradients and there are none, or the configuration has other
            sparse parameters or other blocks, or a method that is to train densely.
        NaNParameterError: A sparse parameter holds NaN; a ValueError too.
        torch.OutOfMemoryError: The device has too little memory; the text says the way on.
    """
    state = ordinary(state) if state.step.is_inference() else state
    check_refresh(state.weights, config, int(state.step))
    try:
        return _refreshed(state, config, gradients)
    except torch.OutOfMemoryError as reason:
        raise torch.OutOfMemoryError(TOO_LARGE) from reason


TOO_LARGE = (
    "the device has too little memory to choose sets anew, which takes up to 40 bytes for each "
    "entry of the largest weight; the state is as it was. Let θ rest, and be ranked, on the host: "
    "save the state and load(..., theta_device='cpu'), or begin with init_state(..., "
    "theta_device='cpu')"
)


def _refreshed(state: TrainState, config: TopKastConfig, gradients: Params | None) -> TrainState:
    dense, masks = chosen_anew(
        state.weights.dense(),
        state.weights.sparse(),
        state.weights.masks,
        config,
        step=int(state.step),
        seed=int(state.mask_seed),
        exponents=state.exponents,
        gradients=gradients,
    )
    sizes = sizes_after(state.weights, config, int(state.step))
    weights, slots = state.weights.chosen(dense, masks, state.optimizer.slots, sizes)
    return state._replace(weights=weights, optimizer=state.optimizer._replace(slots=slots))


def sizes_after(weights: Weights, config: TopKastConfig, step: int) -> dict[str, tuple[int, int]]:
    """Return |A| and |B| by name after a refresh, of which the host knows without counting."""
    if config.schedule.settled(step):
        return {name: (active, active) for name, (active, _) in weights.sizes().items()}
    shapes = weights.shapes()
    return counts_among({name: shapes[name] for name in weights.sparse()}, config, step)


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
        raw: θ by name, or φ where it is trained.
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
    if stays:
        return raw, {name: Masks(m.forward, m.forward.clone()) for name, m in old.items()}
    theta = _powered(raw, exponents)
    allocations = shared_among_all({name: theta[name].shape for name in names}, config, step)
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


def dense_params(state: TrainState) -> Tensors:
    """Return θ by name, the entries outside B included.

    Args:
        state: The state.

    Returns:
        θ, copies, in the dtype that it is kept in; in compact storage the sparse parameters are on
        ``theta_device``.
    """
    return _apart(state, theta_in(state))


def masks_of(state: TrainState) -> dict[str, Masks]:
    """Return A and B of the sparse parameters by name.

    Args:
        state: The state.

    Returns:
        Masks by name, copies; dense parameters are absent.
    """
    masks = state.weights.masks()
    return {n: Masks(sets.forward.clone(), sets.backward.clone()) for n, sets in masks.items()}


def forward_params(state: TrainState) -> Tensors:
    """Return what inference needs: α = θ·1_A, the dense parameters, and the buffers.

    ``model.load_state_dict(forward_params(state), strict=False)`` makes a plain model of it,
    and ``torch.func.functional_call(model, forward_params(state), inputs)`` runs it.

    Args:
        state: The state.

    Returns:
        Tensors by name, copies, which the model may write to: α, in the dtype that the forward
        pass computes in, then frozen parameters, then buffers. ``load_state_dict`` passes over
        buffers that are not persistent, `functional_call` does not.
    """
    return _apart(state, alpha_in(state))


def theta_in(state: TrainState) -> Tensors:
    """Return θ by name, to be read: some tensors are those of the state."""
    return _powered(state.weights.dense(), state.exponents)


def alpha_in(state: TrainState) -> Tensors:
    """Return what `forward_params` does, to be read: some tensors are those of the state."""
    alpha = narrowed(_powered(state.weights.forward(), state.exponents), state.narrow)
    return {**alpha, **state.frozen, **state.buffers}


def narrowed(tensors: Tensors, narrow: Params) -> Tensors:
    """Return tensors in the dtypes that the forward pass computes in; see `TrainState`."""
    return tensors | {name: tensors[name].to(like.dtype) for name, like in narrow.items()}


def ordinary(tree: Tree) -> Tree:
    """Copy the inference tensors of a tree, which autograd refuses; leave the others."""
    if not any(leaf.is_inference() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)):
        return tree
    copied: Tree = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, tree)
    return copied


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
            if isinstance(globs, tuple) and _matches(name, globs) and not _matches(own, globs):
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


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(name == glob or fnmatchcase(name, glob) for glob in globs)


def _powered(raw: Tensors, exponents: Params) -> Tensors:
    """Return θ of φ, where φ is trained."""
    return raw | {name: theta_of(raw[name], a) for name, a in exponents.items()}


def _apart(state: TrainState, tensors: Tensors) -> Tensors:
    """Copy the tensors that are those of a state."""
    held = set(map(id, tree_leaves(state)))
    return {name: t.clone() if id(t) in held else t for name, t in tensors.items()}


def _copied(tensors: Params) -> Tensors:
    return {name: tensor.detach().as_subclass(Tensor).clone() for name, tensor in tensors.items()}
