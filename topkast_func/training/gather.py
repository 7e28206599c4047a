"""The whole of a state, put together from the ranks that own its parts."""

import torch
import torch.distributed as dist
from torch import Tensor

from topkast_func.distributed.launched import world
from topkast_func.distributed.ranks import Ranks
from topkast_func.distributed.roll import calling
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.parted import with_theta
from topkast_func.training.split import LOST, check_parts, joined
from topkast_func.training.state import TrainState, check_one, elsewhere
from topkast_func.types import Tensors


@torch.inference_mode(False)
def gather(state: TrainState, process_group: dist.ProcessGroup | None = None) -> TrainState:
    """Return the whole of a state that ranks have in parts; a collective call.

    That is what a step of ``make_train_step(..., shard="owners")`` returns. The whole can be read
    by `dense_params`, written by `save`, and trained on by any step, this one included.
    `forward_params` and `masks_of` read a part as well.

    Args:
        state: The part of this rank; a whole state is returned as it is.
        process_group: The group; None for all processes, or for one where there are no others.

    Returns:
        The state, the same on all ranks.

    Raises:
        TypeError: ``state`` is no state.
        ValueError: It is an ensemble of states, stacked; or no rank owns some of it.
        RuntimeError: Another rank is lost.
    """
    check_one(state)
    ranks = Ranks(process_group or world())
    with calling(ranks, f"in gather at step {int(state.step)}"):
        kinds = {name: theta.device.type for name, theta in state.weights.theta.items()}
        check_parts(ranks, state)
        state = joined(ranks, state)
        told = ranks.told((elsewhere(state), kinds))
        weights, names = state.weights, dict.fromkeys(name for away, _ in told for name in away)
        owners = {
            name: [rank for rank, (away, _) in enumerate(told) if name not in away]
            for name in names
        }
        if lost := [name for name, found in owners.items() if not found]:
            raise ValueError(LOST.format(lost))
        if not isinstance(weights, CompactWeights):
            return state

        def sent(name: str, own: Tensor) -> Tensor:
            device = weights.values[name].device
            here = torch.empty_like(own, device=device) if own.is_meta else own
            return ranks.sent(owners[name][0], here)

        def filled(tree: Tensors) -> Tensors:
            return {n: sent(n, tensor) if n in owners else tensor for n, tensor in tree.items()}

        dense = weights.dense()
        theta = {
            name: sent(name, dense[name]).to(told[owners[name][0]][1][name])
            for name in weights.sparse_names
            if name in owners
        }
        slots = {kind: filled(tree) for kind, tree in state.optimizer.slots.items()}
    return state._replace(
        weights=with_theta(weights, theta), optimizer=state.optimizer._replace(slots=slots)
    )
