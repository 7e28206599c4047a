"""Which parameters are sparse, and how sparse each of them is."""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

from topkast_func.config import SparsityMap, TopKastConfig, check_order
from topkast_func.types import Params


class Allocation(NamedTuple):
    """Sparsities of one parameter.

    Attributes:
        forward: 1 − D, fraction in [0, 1).
        backward: 1 − (D + M), fraction in [0, forward].
    """

    forward: float
    backward: float


def check_params(params: Params) -> None:
    """Check that every leaf is a floating-point tensor with at least one entry.

    Args:
        params: The parameter tree.

    Raises:
        TypeError: The tree is not a mapping, or a leaf is not a floating-point tensor.
        ValueError: A leaf is empty.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params must map names to tensors, got {type(params).__name__}")
    for name, leaf in params.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"params[{name!r}] must be a tensor, got {type(leaf).__name__}; a nested tree "
                "is flattened to names with dots first"
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"params[{name!r}] must have a floating-point dtype, got {leaf.dtype}; buffers "
                "do not belong among the parameters"
            )
        if leaf.numel() == 0:
            raise ValueError(f"params[{name!r}] is empty: its shape is {tuple(leaf.shape)}")


def select(params: Params, config: TopKastConfig) -> list[str]:
    """Name the parameters that ``config.sparse`` selects, in the order of ``params``.

    Args:
        params: The parameter tree.
        config: The configuration.

    Returns:
        Names of the selected parameters, at least one.

    Raises:
        ValueError: A pattern, the predicate or the default rule selects no parameter.
    """
    sparse = config.sparse
    if sparse is None:
        chosen = [n for n, leaf in params.items() if n.endswith("weight") and leaf.ndim >= 2]
    elif callable(sparse):
        chosen = [name for name, leaf in params.items() if sparse(name, leaf)]
    else:
        by_glob = {glob: [name for name in params if fnmatchcase(name, glob)] for glob in sparse}
        matched = {name for glob in sparse for name in _some("sparse", glob, by_glob[glob], params)}
        chosen = [name for name in params if name in matched]
    if not chosen:
        raise ValueError(f"sparse={sparse!r} selects no parameter; there are: {_listed(params)}")
    return chosen


def allocate(names: Collection[str], config: TopKastConfig) -> dict[str, Allocation]:
    """Give each selected parameter its forward and backward sparsity.

    Args:
        names: Names of the selected parameters.
        config: The configuration.

    Returns:
        The sparsities by name. Names that no pattern of ``forward_sparsity`` matches are
        absent: those parameters are dense.

    Raises:
        ValueError: A pattern matches no name, two patterns disagree, a parameter has a
            forward but no backward sparsity, or the backward exceeds the forward sparsity.
    """
    forward = _by_name("forward_sparsity", config.forward_sparsity, names)
    backward = _by_name("backward_sparsity", config.backward_sparsity, forward)
    for name in forward:
        if name not in backward:
            raise ValueError(f"no pattern of backward_sparsity matches {name!r}")
        check_order(forward[name], backward[name], name=f"backward_sparsity of {name!r}")
    return {name: Allocation(forward[name], backward[name]) for name in forward}


def _by_name(field: str, sparsity: Any, names: Collection[str]) -> dict[str, float]:
    if not isinstance(sparsity, SparsityMap):
        return dict.fromkeys(names, sparsity)
    found: dict[str, float] = {}
    for glob, value in sparsity.items():
        for name in _some(field, glob, sparsity.matching(glob, names), names):
            if found.setdefault(name, value) != value:
                raise ValueError(
                    f"{field} gives {name!r} both {found[name]} and {value} (pattern {glob!r})"
                )
    return found


def _some(field: str, glob: str, matched: list[str], names: Iterable[str]) -> list[str]:
    if not matched:
        raise ValueError(f"{field}: {glob!r} matches no parameter; there are: {_listed(names)}")
    return matched


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
