"""The stateless training step: state and batch in, state and metrics out."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from topkast_func.allocation import allocate, check_params, select
from topkast_func.compilation import compiled
from topkast_func.config import TopKastConfig, check_count
from topkast_func.dense import DenseWeights
from topkast_func.forward import bind, buffers, check_names, frozen, straight_through_all, trainable
from topkast_func.loss import check_scalar
from topkast_func.masks import Masks, NaNParameterError, masks_at
from topkast_func.optim import Optimizer, OptimizerState
from topkast_func.types import LossFn, Model, Params, Tensors


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
    weights: DenseWeights
    buffers: Tensors
    frozen: Tensors
    optimizer: OptimizerState


class StepMetrics(NamedTuple):
    """What a step tells its caller, 0-d tensors.

    Attributes:
        loss: data_loss + λ·penalty.
        data_loss: What ``loss_fn`` returned.
        penalty: The exploration penalty before its weight λ.
    """

    loss: Tensor
    data_loss: Tensor
    penalty: Tensor


Objective: TypeAlias = tuple[Tensor, tuple[Tensor, Tensor, Tensors]]
"""The loss; beside it the data loss, the penalty and the buffers as the model left them."""

TrainStep: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]


def init_state(
    model_or_params: nn.Module | Params,
    config: TopKastConfig,
    optimizer: Optimizer,
    *,
    storage: Literal["dense"] = "dense",
    seed: int = 0,
) -> TrainState:
    """Start training: copy the weights, choose A and B, make zero slots.

    Args:
        model_or_params: A module, of which the parameters that require a gradient are
            trained, or weights by name.
        config: The configuration.
        optimizer: The optimiser.
        storage: How the weights are kept.
        seed: Seed of the random numbers that the model draws (dropout), at least 0.

    Returns:
        The state before step 0. It shares no memory with the arguments.

    Raises:
        TypeError: A leaf is not a floating-point tensor.
        ValueError: A leaf is empty or the configuration does not fit.
        NaNParameterError: A leaf holds NaN; a ValueError too.
    """
    if storage != "dense":
        raise ValueError(f"storage must be 'dense', got {storage!r}")
    model = model_or_params
    params = trainable(model) if isinstance(model, nn.Module) else model
    check_params(params)
    for name, leaf in params.items():
        if leaf.isnan().any():
            raise NaNParameterError(f"params[{name!r}] holds NaN")
    theta = _copied(params)
    weights = stored(theta, masks_at(theta, allocate(select(theta, config), config), config))
    return TrainState(
        step=torch.zeros((), dtype=torch.int64),
        seed=torch.tensor(check_count("seed", seed, 0)),
        weights=weights,
        buffers=_copied(buffers(model)),
        frozen=_copied(frozen(model)),
        optimizer=optimizer.init(weights.values()),
    )


def make_train_step(
    model: Model,
    loss_fn: LossFn,
    config: TopKastConfig,
    optimizer: Optimizer,
    *,
    compile: bool | Mapping[str, Any] = True,
) -> TrainStep:
    """Build ``train_step(state, batch) -> (state, metrics)``.

    The step is pure: it writes to none of its arguments and not to the module. Before step t
    it chooses A and B anew when ``config.refresh_every`` divides t > 0, and makes B the
    forward set at t = ``config.explore_until``. The update, momentum and weight decay
    included, is restricted to B. The same state and batch give the same result, dropout
    included: random numbers follow from the state's seed and step.

    A loss that is NaN is returned as it is; θ then holds NaN, and a refresh that comes due
    keeps the sets and warns.

    Args:
        model: A module, in the training or evaluation mode it has at the call, or a pure
            function ``apply(params, *inputs)``.
        loss_fn: ``loss_fn(apply, batch)`` to a 0-d tensor.
        config: The configuration.
        optimizer: The optimiser.
        compile: True for one graph per shape of batch by `torch.compile`, its own options as
            a mapping, or False to run eager, for debugging.

    Returns:
        The step. It raises TypeError where the loss is no 0-d tensor, ValueError where the
        state is of another model, RuntimeError where the model breaks the graph, and
        whatever the model itself raises; the caller's state is whole after any of these.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> from topkast_func import sgd
        >>> config, optimizer = TopKastConfig(), sgd(lr=0.1)
        >>> state = init_state(model, config, optimizer)
        >>> mse = lambda apply, batch: (apply(batch) ** 2).mean()
        >>> train_step = make_train_step(model, mse, config, optimizer, compile=False)
        >>> state, metrics = train_step(state, torch.ones(8, 4))
        >>> int(state.step), metrics.loss.shape
        (1, torch.Size([]))
    """

    def step(state: TrainState, batch: Any, lr: Tensor) -> tuple[TrainState, StepMetrics]:
        weights = state.weights

        def objective(values: Tensors) -> Objective:
            written = {name: buffer.clone() for name, buffer in state.buffers.items()}
            apply = bind(model, weights.alpha(values), state.frozen, written)
            data_loss = check_scalar(loss_fn(apply, batch))
            penalty = weights.penalty(values, config)
            loss = data_loss + config.penalty_weight * penalty
            return loss, (data_loss, penalty, written)

        with torch.no_grad():
            differentiate = grad_and_value(objective, has_aux=True)
            grads, (loss, (data_loss, penalty, written)) = differentiate(weights.values())
            updates, moved = optimizer.update(grads, state.optimizer, weights.values(), lr)
            after = TrainState(
                step=state.step + 1,
                seed=state.seed,
                weights=weights.moved(updates),
                buffers=written,
                frozen=state.frozen,
                optimizer=OptimizerState(moved.step, weights.restricted(moved.slots)),
            )
        return after, StepMetrics(loss, data_loss, penalty)

    run: Callable[..., tuple[TrainState, StepMetrics]] = compiled(step, compile)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        check_names(model, state.weights.values().keys() | state.frozen.keys())
        state = _refreshed_when_due(state, config)
        with _random_numbers_of(state):
            return run(state, batch, optimizer.learning_rate(state.optimizer.step))

    return train_step


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
    if config.explore_until is not None and int(state.step) >= config.explore_until:
        masks = {n: Masks(m.forward, m.forward.clone()) for n, m in masks_of(state).items()}
    else:
        masks = masks_at(dense_params(state), allocate(masks_of(state), config), config)
    weights, slots = state.weights.chosen(masks, state.optimizer.slots)
    return state._replace(weights=weights, optimizer=state.optimizer._replace(slots=slots))


def dense_params(state: TrainState) -> Tensors:
    """Return θ by name, the entries outside B included.

    Args:
        state: The state.

    Returns:
        The tensors of the state, not copies.
    """
    return state.weights.theta


def masks_of(state: TrainState) -> dict[str, Masks]:
    """Return A and B of the sparse parameters by name.

    Args:
        state: The state.

    Returns:
        Masks by name; dense parameters are absent.
    """
    return state.weights.masks


def forward_params(state: TrainState) -> Tensors:
    """Return what inference needs: α = θ·1_A, the dense parameters, and the buffers.

    ``model.load_state_dict(forward_params(state), strict=False)`` makes a plain model of it,
    and ``torch.func.functional_call(model, forward_params(state), inputs)`` runs it.

    Args:
        state: The state.

    Returns:
        Tensors by name: α, then frozen parameters, then buffers.
    """
    alpha = straight_through_all(dense_params(state), masks_of(state))
    return {**alpha, **state.frozen, **state.buffers}


def stored(theta: Tensors, masks: dict[str, Masks]) -> DenseWeights:
    """Put weights into the form of the storage.

    Args:
        theta: θ by name.
        masks: Sets of the sparse parameters by name.

    Returns:
        The weights of a state.
    """
    return DenseWeights(theta, masks)


def _refreshed_when_due(state: TrainState, config: TopKastConfig) -> TrainState:
    t, every, until = int(state.step), config.refresh_every, config.explore_until
    exploring = until is None or t < until
    if not (t == until or (exploring and every is not None and t > 0 and t % every == 0)):
        return state
    try:
        return refresh(state, config)
    except NaNParameterError as reason:
        warnings.warn(f"no refresh before step {t}: {reason}", stacklevel=3)
        return state


@contextmanager
def _random_numbers_of(state: TrainState) -> Iterator[None]:
    """Draw the random numbers of this step, and leave the caller's generators as they are."""
    device = next(iter(state.weights.values().values())).device
    cuda = [device.index] if device.type == "cuda" else []
    entropy = (int(state.seed), int(state.step))
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _copied(tensors: Params) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
