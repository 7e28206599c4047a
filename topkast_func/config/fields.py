"""The fields of a configuration, each checked and in its hashable form."""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from topkast_func.checks import (
    check_block_shape,
    check_choice,
    check_count,
    check_number,
    check_share,
)
from topkast_func.config.as_json import METHODS
from topkast_func.config.schedule import check_refresh_every
from topkast_func.groups import check_pattern
from topkast_func.methods import Method
from topkast_func.methods.contract import check_method
from topkast_func.sparsity import ByPattern, Fixed, Staged
from topkast_func.types import BlockNorm

FORWARD_SPARSITY = 0.9
"""1 − D where neither a sparsity nor a pattern is given."""

Penalty: TypeAlias = Literal["l2", "l1", "group_l2"]
Shares: TypeAlias = Literal["uniform", "erk"]
Predicate: TypeAlias = Callable[[str, Tensor], bool]


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the fields of a configuration one by one; see `TopKastConfig`.

    Args:
        given: The fields by name, as they were given.

    Returns:
        The same in hashable form.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is outside its range, or NaN.
    """
    forward, backward = given["forward_sparsity"], given["backward_sparsity"]
    pattern, until = given["pattern"], given["explore_until"]
    groups = None if pattern is None else check_pattern("pattern", pattern)
    if forward is None:
        forward = FORWARD_SPARSITY if groups is None else groups.sparsity
    return {
        "forward_sparsity": _sparsity("forward_sparsity", forward),
        "backward_sparsity": None if backward is None else _sparsity("backward_sparsity", backward),
        "sparse": _selection(given["sparse"]),
        "refresh_every": check_refresh_every(given["refresh_every"]),
        "explore_until": None if until is None else check_count("explore_until", until, 0),
        "penalty": check_choice("penalty", given["penalty"], (*get_args(Penalty), None)),
        "penalty_weight": check_number("penalty_weight", given["penalty_weight"], 0.0),
        "block_shape": check_block_shape("block_shape", given["block_shape"]),
        "block_norm": check_choice("block_norm", given["block_norm"], get_args(BlockNorm)),
        "method": _method(given["method"]),
        "allocation": _allocation(given["allocation"]),
        "keep_dense": _globs("keep_dense", given["keep_dense"]),
        "powerprop": check_number("powerprop", given["powerprop"], 1.0),
        "pattern": None if groups is None else str(groups),
    }


def _sparsity(name: str, value: object) -> Fixed | Staged:
    if isinstance(value, Staged):
        return value
    if not isinstance(value, Mapping):
        return check_number(name, value, 0.0, 1.0)
    return ByPattern({
        pattern: check_number(f"{name}[{pattern!r}]", s, 0.0, 1.0)
        for pattern, s in _patterns(name, value).items()
    })


def _allocation(value: object) -> object:
    if not isinstance(value, Mapping):
        return check_choice("allocation", value, get_args(Shares))
    return ByPattern({
        pattern: check_share(f"allocation[{pattern!r}]", share)
        for pattern, share in _patterns("allocation", value).items()
    })


def _patterns(name: str, value: Mapping[Any, Any]) -> Mapping[str, object]:
    if not value:
        raise ValueError(f"{name} must name at least one pattern, got an empty mapping")
    if not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"the keys of {name} must be glob patterns, got {list(value)!r}")
    return value


def _method(value: object) -> Method:
    if isinstance(value, Method):
        check_method(value)
        return value
    name = value if isinstance(value, str) else getattr(value, "__name__", "")
    make = METHODS.get(name)
    way = f": call it, tk.{name}({_arguments(make)})" if make and value in (name, make) else ""
    raise TypeError(f"method must be a method such as topkast() or rigl(), got {value!r}{way}")


def _arguments(make: Callable[..., Method]) -> str:
    """Return what a constructor is called with, and the defaults, as one writes it."""
    given = signature(make).parameters.values()
    return ", ".join(str(p.replace(annotation=Parameter.empty)) for p in given)


def _selection(sparse: object) -> tuple[str, ...] | Predicate | None:
    if sparse is None or callable(sparse):
        return sparse
    globs = _globs("sparse", sparse)
    if not globs:
        raise ValueError("sparse must name at least one pattern, got an empty sequence")
    return globs


def _globs(name: str, value: object) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, Sequence) or not all(isinstance(g, str) for g in globs):
        others = "None, a glob pattern, a sequence of them, or a predicate (name, tensor) -> bool"
        allowed = others if name == "sparse" else "a glob pattern or a sequence of them"
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    return tuple(globs)
