"""What is read out of a state: θ, A and B, and what inference needs."""

from torch.utils._pytree import tree_leaves

from topkast_func.powerprop import theta_of
from topkast_func.training.state import TrainState, check_at_hand, check_state
from topkast_func.types import Masks, Params, Tensors


def dense_params(state: TrainState) -> Tensors:
    """Return θ by name, the entries outside B included.

    Args:
        state: The state.

    Returns:
        θ, copies, in the dtype that it is kept in; in compact storage the sparse parameters are on
        ``theta_device``.

    Raises:
        TypeError: It is no state.
        ValueError: It is an ensemble of states, stacked, or other ranks own a part of it.
    """
    check_state(state)
    check_at_hand(state)
    return _apart(state, theta_in(state))


def masks_of(state: TrainState) -> dict[str, Masks]:
    """Return A and B of the sparse parameters by name.

    Args:
        state: The state.

    Returns:
        Masks by name, copies; dense parameters are absent.

    Raises:
        TypeError: It is no state.
        ValueError: It is an ensemble of states, stacked.
    """
    check_state(state)
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

    Raises:
        TypeError: It is no state.
        ValueError: It is an ensemble of states, stacked.
    """
    check_state(state)
    return _apart(state, alpha_in(state))


def theta_in(state: TrainState) -> Tensors:
    """Return θ by name, to be read: some tensors are those of the state."""
    return powered(state.weights.dense(), state.exponents)


def alpha_in(state: TrainState) -> Tensors:
    """Return what `forward_params` does, to be read: some tensors are those of the state."""
    alpha = narrowed(powered(state.weights.forward(), state.exponents), state.narrow)
    return {**alpha, **state.frozen, **state.buffers}


def narrowed(tensors: Tensors, narrow: Params) -> Tensors:
    """Return tensors in the dtypes that the forward pass computes in; see `TrainState`."""
    return tensors | {name: tensors[name].to(like.dtype) for name, like in narrow.items()}


def powered(raw: Tensors, exponents: Params) -> Tensors:
    """Return θ of φ, where φ is trained."""
    return raw | {name: theta_of(raw[name], a) for name, a in exponents.items()}


def _apart(state: TrainState, tensors: Tensors) -> Tensors:
    """Copy the tensors that are those of a state."""
    held = set(map(id, tree_leaves(state)))
    return {name: t.clone() if id(t) in held else t for name, t in tensors.items()}
