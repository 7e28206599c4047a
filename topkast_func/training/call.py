"""What is known of a step before its turn."""

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from topkast_func.config import TopKastConfig
from topkast_func.model.alone import parts_of
from topkast_func.model.modules import hooks, modes
from topkast_func.training.compilation import signature
from topkast_func.training.optim import Optimizer
from topkast_func.training.optim.rates import Rate, checked
from topkast_func.training.refresh import refreshes_around
from topkast_func.training.state import TrainState


class Call(NamedTuple):
    """A step that is to be made.

    Attributes:
        parts: The parts that the model has by now.
        mode: The ``training`` flag of each.
        hooked: See `hooks_of`.
        sizes: Shapes of all that is stored as values.
        kind: What tells steps apart that draw random numbers or do not, and that have graphs apart.
        rate: The learning rate.
        is_due: See `refreshes_around`.
        ends: See there.
    """

    parts: list[Any]
    mode: tuple[bool, ...]
    hooked: Hashable
    sizes: tuple[Any, ...]
    kind: Hashable
    rate: Rate
    is_due: bool
    ends: bool


def call_of(
    model: object,
    criterion: object,
    config: TopKastConfig,
    optimizer: Optimizer,
    state: TrainState,
    batch: Any,
    traced: bool,
) -> Call:
    """Look at what a step is given.

    Args:
        model: The model.
        criterion: The loss function, a module perhaps.
        config: The configuration.
        optimizer: The optimiser.
        state: The state.
        batch: The batch.
        traced: Whether the step is compiled.

    Returns:
        The call.

    Raises:
        TypeError: See `signature` and `checked`.
        ValueError: See `checked`; or the learning rate is on the meta device.
    """
    parts = parts_of(model)
    mode, hooked = modes(parts), hooks_of(parts, criterion)
    sizes = tuple(value.shape for value in state.weights.values.values())
    refreshes = refreshes_around(state, config, optimizer)
    kind: Hashable = mode
    if traced:
        stored = type(state.weights), sizes, config.schedule.stage(int(state.step))
        kind = mode, hooked, *stored, *refreshes, signature(batch)
    rate = tree_map(_with_number, optimizer.learning_rate(state.optimizer.step))
    return Call(parts, mode, hooked, sizes, kind, rate, *refreshes)


def _with_number(given: Any) -> Tensor:
    rate = checked(given)
    if rate.is_meta:
        raise ValueError("lr has no number: it is a tensor on the meta device")
    return rate


def hooks_of(parts: list[Any], criterion: object) -> Hashable:
    """Return the numbers of the hooks of a model, by its parts, and of its loss function."""
    return hooks([*parts, *parts_of(criterion)])
