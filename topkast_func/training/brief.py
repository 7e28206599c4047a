"""A state in a few lines, for whoever prints one."""

from collections.abc import Iterable
from textwrap import shorten
from typing import TYPE_CHECKING

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from topkast_func.storage.compact import CompactWeights

if TYPE_CHECKING:
    from topkast_func.training.state import TrainState

WIDTH = 80
"""Characters of a line, at most."""


def brief(state: "TrainState") -> str:
    """Describe a state in a few lines, whatever its size; see also `summary`.

    Args:
        state: The state: one, or an ensemble.

    Returns:
        The text.
    """
    weights, shapes = state.weights, state.weights.shapes()
    sparse, storage = weights.sparse_names, "dense"
    if isinstance(weights, CompactWeights):
        storage = "compact"
    sizes = [shape.numel() for shape in shapes.values()]
    lines = [
        f"TrainState(step={_number(state.step)}, seed={_number(state.seed)}, "
        f"mask_seed={_number(state.mask_seed)})",
        f"{storage} storage: {len(sizes):,} parameters of {sum(sizes):,} entries",
    ]
    if sparse and _is_plain(state.step):
        full = sum(shapes[name].numel() for name in sparse)
        active, stored = (sum(both) for both in zip(*weights.sizes().values(), strict=True))
        share = f"{active / full:.2%} in A, {stored / full:.2%} in B"
        lines.append(f"{len(sparse):,} of them sparse: {full:,} entries, {share}")
    lines += [
        f"slots: {_listed(state.optimizer.slots)}",
        f"buffers: {_listed(state.buffers)}",
        f"frozen: {_listed(state.frozen)}",
        "see dense_params, forward_params, masks_of, summary",
    ]
    return "\n  ".join(shorten(line, WIDTH - 2, placeholder=" …") for line in lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _is_plain(tensor: Tensor) -> bool:
    return not (tensor.ndim or tensor.is_meta or is_functorch_wrapped_tensor(tensor))


def _number(tensor: Tensor) -> str:
    return str(int(tensor)) if _is_plain(tensor) else f"tensor of {list(tensor.shape)}"
