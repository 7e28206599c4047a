"""The state of training: what it holds, how it starts, and its refresh."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from topkast_func.allocation import allocate
from topkast_func.compact import CompactWeights, compact
from topkast_func.config import TopKastConfig, check_count
from topkast_func.dense import DenseWeights
from topkast_func.forward import buffers, frozen, trainable
from topkast_func.layers import kernel_layers
from topkast_func.masks import Masks, compute_masks, masks_at
from topkast_func.optim import Optimizer, OptimizerState
from topkast_func.types import Params, Tensors

Weights: TypeAlias = CompactWeights | DenseWeights
"""The weights of a state, in either storage."""

Storage: TypeAlias = Literal["compact", "dense"]


class TrainState(NamedTuple):
    """All that the next step needs, as tensors.

    Attributes:
        step: Number t of the next step, int64, 0-d, on the CPU.
        seed: Seed of the random numbers that the model draws, int64, 0-d, on the CPU.
        weights: θ and its sets, in the form of the storage; read them with `dense_params`,
            `forward_params` and `masks_of`.
        buffers: Buffers of the module by name, such as BatchNorm statistics.
        frozen: Parameters of the module that require no gradient, by name.
        optimizer: State of the optimiser.
    """

    step: Tensor
    seed: Tensor
    weights: Weights
    buffers: Tensors
    frozen: Tensors
    optimizer: OptimizerState


def init_state(
    model_or_params: nn.Module | Params,
    config: TopKastConfig,
    optimizer: Optimizer,
    *,
    storage: Storage = "compact",
    theta_device: torch.device | str | None = None,
    seed: int = 0,
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
        seed: Seed of the random numbers that the model draws (dropout), at least 0.

    Returns:
        The state before step 0. It shares no memory with the arguments.

    Raises:
        TypeError: A leaf is not a floating-point tensor.
        ValueError: A leaf is empty, the configuration does not fit, or ``theta_device`` is
            given for dense storage.
        NaNParameterError: A leaf holds NaN; a ValueError too.
    """
    if storage not in ("compact", "dense"):
        raise ValueError(f"storage must be 'compact' or 'dense', got {storage!r}")
    if storage == "dense" and theta_device is not None:
        raise ValueError("theta_device is for compact storage: dense storage computes with θ")
    model = model_or_params
    params = trainable(model) if isinstance(model, nn.Module) else model
    masks = compute_masks(params, config)
    weights: Weights
    if storage == "compact":
        matrices = [name for name, theta in params.items() if theta.ndim == 2]
        layers = kernel_layers(model) if isinstance(model, nn.Module) else matrices
        weights = compact(params, masks, layers, config.block_shape, theta_device)
    else:
        weights = DenseWeights(_copied(params), masks)
    return TrainState(
        step=torch.zeros((), dtype=torch.int64),
        seed=torch.tensor(check_count("seed", seed, 0) % 2**63),
        weights=weights,
        buffers=buffers(model),
        frozen=_copied(frozen(model)),
        optimizer=optimizer.init(weights.values()),
    )


def refresh(state: TrainState, config: TopKastConfig) -> TrainState:
    """Choose A and B anew from θ; from step ``config.explore_until`` on, let B be A.

    An optimiser slot stays with its weight; an entry that newly enters B starts at zero.

    Args:
        state: The state; it is not written to.
        config: The configuration.

    Returns:
        The state with its new sets.

    Raises:
        NaNParameterError: A sparse parameter holds NaN; a ValueError too.
    """
    theta = dense_params(state)
    if config.explore_until is not None and int(state.step) >= config.explore_until:
        masks = {n: Masks(m.forward, m.forward.clone()) for n, m in masks_of(state).items()}
    else:
        masks = masks_at(theta, allocate(state.weights.sparse(), config), config)
    weights, slots = state.weights.chosen(theta, masks, state.optimizer.slots)
    return state._replace(weights=weights, optimizer=state.optimizer._replace(slots=slots))


def dense_params(state: TrainState) -> Tensors:
    """Return θ by name, the entries outside B included.

    Args:
        state: The state.

    Returns:
        θ; in dense storage the tensors of the state, not copies; in compact storage the sparse
        parameters are put together, on ``theta_device``.
    """
    return state.weights.dense()


def masks_of(state: TrainState) -> dict[str, Masks]:
    """Return A and B of the sparse parameters by name.

    Args:
        state: The state.

    Returns:
        Masks by name; dense parameters are absent.
    """
    return state.weights.masks()


def forward_params(state: TrainState) -> Tensors:
    """Return what inference needs: α = θ·1_A, the dense parameters, and the buffers.

    ``model.load_state_dict(forward_params(state), strict=False)`` makes a plain model of it,
    and ``torch.func.functional_call(model, forward_params(state), inputs)`` runs it.

    Args:
        state: The state.

    Returns:
        Tensors by name: α, then frozen parameters, then buffers.
    """
    return {**state.weights.forward(), **state.frozen, **state.buffers}


def _copied(tensors: Params) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
