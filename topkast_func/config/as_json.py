"""Configurations as JSON: numbers, patterns, stages, and methods by their constructors' names."""

from collections.abc import Callable, Mapping
from inspect import signature
from reprlib import repr as short
from typing import Any, TypeVar

from topkast_func.config.schedule import ByStep
from topkast_func.methods.base import Method
from topkast_func.methods.exchange import RigL, SparseEvolution, Static, rigl, set, static
from topkast_func.methods.magnitude import (
    Dense,
    GradualPruning,
    RandomBackward,
    StraightThrough,
    TopKast,
    dense,
    gmp,
    random_backward,
    ste,
    topkast,
)
from topkast_func.sparsity import ByPattern, Staged, staged

T = TypeVar("T")

CONSTRUCTORS: dict[type[Method], Callable[..., Method]] = {
    TopKast: topkast,
    RandomBackward: random_backward,
    StraightThrough: ste,
    Static: static,
    SparseEvolution: set,
    RigL: rigl,
    GradualPruning: gmp,
    Dense: dense,
}
BY_STEP = ("forward_sparsity", "backward_sparsity", "refresh_every")
"""Fields that may change over time."""
METHODS = {make.__name__: make for make in CONSTRUCTORS.values()}


def described(fields: Mapping[str, object]) -> dict[str, Any]:
    """Describe the fields of a configuration.

    Numbers by pattern are objects, those by step lists of [step, number], a method is an object
    of the ``name`` of its constructor and its arguments, and what is code, a predicate or a
    method of one's own, is {"code": its qualified name}.

    Args:
        fields: The fields by name, as `TopKastConfig` holds them.

    Returns:
        What `json.dumps` takes.
    """
    return {name: _described(value) for name, value in fields.items()}


def code_of(description: object) -> dict[str, str]:
    """Return the qualified names of what is code in a description, by field.

    Args:
        description: What `described` returned, or JSON from elsewhere.

    Returns:
        The names.

    Raises:
        ValueError: The description is no JSON object.
    """
    if not isinstance(description, dict):
        raise ValueError(f"a configuration must be a JSON object, got {short(description)}")
    values = {field: description.get(field) for field in ("sparse", "method")}
    return {
        field: value["code"]
        for field, value in values.items()
        if isinstance(value, dict) and isinstance(value.get("code"), str)
    }


def told(code: Mapping[str, str]) -> str:
    """Tell in words what `code_of` found."""
    return " and ".join(f"{field} is the code of {name:.200}" for field, name in code.items())


def made(make: Callable[..., T], description: Mapping[str, Any], given: Mapping[str, Any]) -> T:
    """Undo `described`.

    Args:
        make: The class of the configuration.
        description: What `described` returned, or a JSON object from elsewhere; a field that is
            left out has its default.
        given: Fields to take in place of those that are described, by name.

    Returns:
        The configuration.

    Raises:
        ValueError: A field or a method is unknown, or a value is not allowed.
    """
    plain = {name: description[name] for name in description if name not in given}
    try:
        fields = {name: _recalled(name, value) for name, value in plain.items()}
        return _called(make, {**fields, **given})
    except TypeError as reason:
        raise ValueError(str(reason)) from reason


def _described(value: object) -> Any:
    if isinstance(value, Method):
        make = CONSTRUCTORS.get(type(value))
        return {"name": make.__name__, **vars(value)} if make else _code(type(value))
    if isinstance(value, ByPattern):
        return dict(value)
    if isinstance(value, Staged):
        return [list(stage) for stage in zip(value.steps, value.sparsities, strict=True)]
    if isinstance(value, ByStep):
        return [list(stage) for stage in value.items()]
    if callable(value):
        return _code(value)
    return list(value) if isinstance(value, tuple) else value


def _code(value: Any) -> dict[str, str]:
    named = value if hasattr(value, "__qualname__") else type(value)
    return {"code": f"{named.__module__}.{named.__qualname__}"}


def _recalled(field: str, value: Any) -> Any:
    if field in BY_STEP and isinstance(value, list):
        if not all(isinstance(stage, list) and len(stage) == 2 for stage in value):
            raise TypeError(f"{field} must be pairs [step, number], got {value!r}")
        numbers = dict(value)
        if len(numbers) < len(value):
            raise ValueError(f"{field} must give each step one number, got {value!r}")
        return numbers if field == "refresh_every" else staged(numbers)
    if field == "method":
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(
                f'method must be an object {{"name": one of {list(METHODS)}, ...}}, got {value!r}'
            )
        return _called(METHODS[name], {key: value[key] for key in value if key != "name"})
    return value


def _called(make: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    known = signature(make).parameters
    if unknown := [name for name in arguments if name not in known]:
        raise ValueError(f"{make.__name__} has no {unknown}; it has {list(known)}")
    return make(**arguments)
