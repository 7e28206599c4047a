"""Which of the first two axes of a weight are the outputs of its layer."""

from collections import defaultdict
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from topkast_func.model.modules import parameters_of, ties

OUTPUTS_FIRST = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
OUTPUTS_SECOND = (nn.Embedding, nn.EmbeddingBag)


class Axes(NamedTuple):
    """How a layer reads the first two axes of a weight.

    Attributes:
        first: Whether the first is that of its outputs, [out, in, …]; otherwise [in, out, …].
        groups: Into how many groups the first axis falls, each with a second axis of its own.
    """

    first: bool
    groups: int = 1


def is_transposed(kind: type) -> bool:
    """Return whether a class is the ``Conv1D`` of transformers, whose weight is [in, out]."""
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def axes_of(layer: nn.Module) -> Axes | None:
    """Return how a layer reads its weights; None where that is not known.

    An embedding table is [in, out]: its inputs are tokens.
    """
    second = isinstance(layer, (_ConvTransposeNd, *OUTPUTS_SECOND))
    if second or any(map(is_transposed, type(layer).__mro__)):
        return Axes(first=False, groups=getattr(layer, "groups", 1))
    known = isinstance(layer, OUTPUTS_FIRST)
    return Axes(first=True, groups=getattr(layer, "groups", 1)) if known else None


def axes_by_name(model: object) -> dict[str, tuple[Axes, ...]]:
    """Return how the layers of a module read its weights, by name; of anything else nothing.

    A tied weight goes by its first name, and may be read in several ways.
    """
    first = ties(model)
    found: dict[str, list[Axes]] = defaultdict(list)
    for name, (layer, _) in parameters_of(model).items():
        axes, own = axes_of(layer), found[first.get(name, name)]
        if axes and axes not in own:
            own.append(axes)
    return {name: tuple(several) for name, several in found.items()}


def empty_lines(active: Tensor, groups: int = 1) -> tuple[int, int]:
    """Count what of a weight has no entry in A.

    Args:
        active: 1_A, bool; what has one axis has no lines.
        groups: See `Axes`.

    Returns:
        How many along its first axis, and how many along its second, of those of all groups.
    """
    if active.ndim < 2:
        return 0, 0
    lines = active[..., None].flatten(2).any(-1)
    parts = lines.reshape(groups, -1, lines.shape[1])
    rows, columns = (int((~parts.any(axis)).sum()) for axis in (2, 1))
    return rows, columns
