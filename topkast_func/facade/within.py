"""The processes among which DistributedDataParallel runs a sparse module, and their sets."""

from torch import distributed

from topkast_func.distributed.checksums import check_same
from topkast_func.distributed.launched import world
from topkast_func.distributed.ranks import Ranks
from topkast_func.distributed.roll import calling
from topkast_func.facade.owners import Owners, first
from topkast_func.facade.wrappers import wrapper_of
from topkast_func.types import Tensors

ONE_START = (
    "tk.sparsify chooses sets of the weights that a rank has then, before DistributedDataParallel "
    "sends those of rank 0: make the model from one seed on all ranks, give tk.sparsify one seed, "
    "and leave broadcast_buffers=True. Begin again on all ranks"
)


def ranks_running(owners: Owners) -> Ranks | None:
    """Return the processes among which sparse weights were last run; None for none."""
    for _, weight in first(owners).values():
        if (wrapper := wrapper_of(weight)) is not None:
            return Ranks(wrapper.process_group)
    return None


def summed(owners: Owners, gradients: Tensors) -> Tensors:
    """Sum gradients over the processes, or over all that there are where none run a wrapper."""
    ranks = ranks_running(owners) or Ranks(world())
    for gradient in gradients.values():
        if ranks.group is not None:
            distributed.all_reduce(gradient, group=ranks.group)
    return gradients


def check_alike(owners: Owners, step: int) -> bool:
    """Check that the sets of sparse weights are the same on all ranks, if any; a collective call.

    Args:
        owners: The weights.
        step: Number of the step, for the error.

    Returns:
        Whether there are several.

    Raises:
        RuntimeError: The sets are not the same, the same on every rank; or a rank is lost.
    """
    ranks = ranks_running(owners)
    if ranks is not None:
        where = f"in sparsifier.step() before step {step}"
        sets = {name: weight.sets(layer) for name, (layer, weight) in first(owners).items()}
        with calling(ranks, where):
            told = f"rank {ranks.rank} of {ranks.size}, {where}"
            check_same(ranks, told, {"sets": sets}, ONE_START)
    return ranks is not None
