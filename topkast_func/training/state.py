"""The state of training: what it holds, and what is read from it."""

from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from topkast_func.checks import check_type
from topkast_func.reading import check_numbers, readable
from topkast_func.storage.weights import Weights as Weights
from topkast_func.training.brief import brief
from topkast_func.training.forms import check_form
from topkast_func.training.optim import OptimizerState
from topkast_func.training.whole import check_whole
from topkast_func.types import Tensors

Tree = TypeVar("Tree")

Storage: TypeAlias = Literal["compact", "dense"]


class Part(NamedTuple):
    """What a rank has of a parameter that all ranks divide, as equal parts in their order.

    Attributes:
        place: Number of the rank, and how many there are, int64, [2], on the CPU.
        theta: θ as it was at the last refresh, a range of its flat entries; [0] of a dense
            parameter.
        slots: Slots of the optimiser by kind, a range of the flat values of B, or of a dense
            parameter.
    """

    place: Tensor
    theta: Tensor
    slots: Tensors


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
        split: By name what this rank has of the parameters that all ranks divide; empty but for
            what a step of ``make_train_step(..., shard="owners")`` returns.
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
    split: dict[str, Part] = {}  # noqa: RUF012  # nobody writes to a state

    def __repr__(self) -> str:
        """Print what it consists of, in a few lines, or why it is none."""
        try:
            check_form("state", self)
            if not self.step.ndim:
                check_state(self)
        except (TypeError, ValueError, RuntimeError) as reason:
            return f"TrainState({reason})"
        return brief(self)


MEMBER = "take a member out of it, tree_map(lambda leaf: leaf[i], state)"
"""The way on for whoever has an ensemble where numbers are read."""

NO_STATE = (
    ": a state is what init_state returns, and a step as the first of two. A model that sparsify "
    "has changed has none: ask what sparsify returned, by sparsifier.summary() or "
    "sparsifier.masks(), and save model.state_dict() with sparsifier.state_dict()"
)
"""The way on for whoever gives something else for a state."""


def check_state(state: Any) -> None:
    """Check that this is the state of one network.

    Args:
        state: What is to be one.

    Raises:
        TypeError: It is none, or a part of it is of another type.
        ValueError: It is an ensemble of states, stacked, or its parts do not go together.
    """
    check_fields(state)
    check_whole(state)


def check_one(state: Any) -> None:
    """Check that this is the state of one network, of which the host can read the numbers.

    Args:
        state: What is to be one.

    Raises:
        TypeError: See `check_state`.
        ValueError: See `check_state`; or `torch.vmap` maps over it.
    """
    check_state(state)
    leaves = (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    if any(map(is_functorch_wrapped_tensor, leaves)):
        raise ValueError(f"state is one of an ensemble that torch.vmap maps over: {MEMBER}")


def check_fields(state: Any) -> None:
    """Check that this is the state of one network, but for what its parts have in common.

    Args:
        state: What is to be one.

    Raises:
        TypeError: It is none, or a part of it is of another type.
        ValueError: It is an ensemble of states, stacked, or its counters are no numbers to count.
        RuntimeError: Nothing has numbers, under `FakeTensorMode`.
    """
    check_numbers("what takes a state")
    check_type("state", state, TrainState, NO_STATE)
    check_form("state", state)
    if state.step.ndim:
        raise ValueError(
            "state is an ensemble of states, stacked: call what returns tensors under torch.vmap, "
            f"or {MEMBER}"
        )
    counters = {"step": state.step, "seed": state.seed, "mask_seed": state.mask_seed}
    for name, counter in {**counters, "optimizer.step": state.optimizer.step}.items():
        known = readable(counter)
        if not known and not is_functorch_wrapped_tensor(counter):
            raise ValueError(f"state.{name} has no number that could be read: {counter!r}")
        if counter.dtype != torch.int64 or counter.ndim or (known and int(counter) < 0):
            raise ValueError(f"state.{name} must be an int64 tensor of at least 0, got {counter!r}")


def elsewhere(state: TrainState) -> list[str]:
    """Name the parameters that other processes own, or own parts of."""
    trees = (state.weights.theta, *state.optimizer.slots.values())
    away = {n: None for tree in trees for n, tensor in tree.items() if tensor.is_meta}
    return list(away | dict.fromkeys(state.split))


def check_at_hand(state: TrainState) -> None:
    """Check that a state is whole.

    Args:
        state: The state.

    Raises:
        ValueError: Other processes own a part of it.
    """
    if names := elsewhere(state):
        raise ValueError(
            f"the state is that of one rank of several, and others own {names}: have "
            "gather(state, process_group) of all ranks return the whole"
        )


def ordinary(tree: Tree) -> Tree:
    """Return a tree with copies of some of its tensors.

    Those are of inference mode, which autograd refuses, and those that stand for the negative of
    what is in memory (the imaginary part of a conjugate), which torch.compile reads without that.
    """
    copied: Tree = tree_map_only(
        Tensor, lambda t: t.clone() if t.is_inference() or t.is_neg() else t, tree
    )
    return copied
