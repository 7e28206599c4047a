"""How a step goes about a state, by how the ranks share it: whole on each, or in parts."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from topkast_func.config import TopKastConfig
from topkast_func.distributed.owners import Owners
from topkast_func.distributed.parallel import Alone
from topkast_func.training.owned import owned_update_of, refresh_by_owners
from topkast_func.training.parts import compared, part
from topkast_func.training.refresh import refresh
from topkast_func.training.state import TrainState, check_at_hand
from topkast_func.training.update import Moved, update_of
from topkast_func.types import Params


class Way(NamedTuple):
    """What a step does with a state.

    Attributes:
        part: From a state to what this rank has of it.
        compared: From that to what ranks hold alike; a collective call.
        update_of: See `update_of`.
        refresh: See `refresh`.
    """

    part: Callable[[TrainState], TrainState]
    compared: Callable[[TrainState], TrainState]
    update_of: Callable[..., Callable[..., Moved]]
    refresh: Callable[[TrainState, TopKastConfig, Params | None], TrainState]


def way_of(ranks: Alone, config: TopKastConfig) -> Way:
    """Return the way of a group of ranks that train by a configuration."""
    if isinstance(ranks, Owners):
        chosen = partial(refresh_by_owners, ranks)
        return Way(partial(part, ranks, config), partial(compared, ranks), owned_update_of, chosen)
    return Way(_whole, _all, update_of, refresh)


def _whole(state: TrainState) -> TrainState:
    check_at_hand(state)
    return state


def _all(state: TrainState) -> TrainState:
    return state
