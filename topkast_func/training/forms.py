"""Whether a tuple is made of what its annotations say, so that errors name what was put into it."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.dense import DenseWeights
from topkast_func.storage.weights import Weights

STORAGES = {Weights: (CompactWeights, DenseWeights)}
"""Classes that fulfil a protocol."""

AS_MADE = (
    "leave what init_state and the step return as it is but for the numbers in its tensors, or "
    "begin anew with init_state"
)
"""The way on for whoever has put a state together by hand."""


def check_form(name: str, value: Any) -> None:
    """Check that the fields of a named tuple are what they are annotated to be.

    Tuples within it are looked into, and the values of dictionaries are asked for their class.

    Args:
        name: What it is called in the error.
        value: The tuple.

    Raises:
        TypeError: One is not.
    """
    kind: Any = type(value)
    for (field, kinds, within), found in zip(_fields(kind), value, strict=True):
        if not isinstance(found, kinds):
            raise TypeError(_misfit(f"{name}.{field}", kinds, found))
        if within is not None:
            for path, kind, one in _others(f"{name}.{field}", within, found):
                raise TypeError(_misfit(path, (kind,), one))
        elif isinstance(found, tuple):
            check_form(f"{name}.{field}", found)


@cache
def _fields(kind: Any) -> list[tuple[str, Any, Any]]:
    """Return name and classes of each field, and of a dictionary the annotation of its values."""
    fields: list[tuple[str, Any, Any]] = []
    for name, hint in get_type_hints(kind).items():
        inner = get_args(hint)[1] if get_origin(hint) is dict else None
        kinds = STORAGES.get(hint, (hint,)) if inner is None else (Mapping,)
        fields.append((name, kinds, inner))
    return fields


def _others(path: str, hint: Any, found: Mapping[str, Any]) -> Iterator[tuple[str, type, Any]]:
    """Find the values of a dictionary that are of another class."""
    if get_origin(hint) is dict:
        for key, inner in found.items():
            if not isinstance(inner, Mapping):
                yield f"{path}[{key!r}]", Mapping, inner
                return
            yield from _others(f"{path}[{key!r}]", get_args(hint)[1], inner)
    elif {*map(type, found.values())} - {hint}:
        for key, one in found.items():
            if not isinstance(one, hint):
                yield f"{path}[{key!r}]", hint, one


def _misfit(path: str, kinds: tuple[type, ...], found: object) -> str:
    names = ["dict" if kind is Mapping else kind.__name__ for kind in kinds]
    return f"{path} must be of type {' or '.join(names)}, got {type(found).__name__}: {AS_MADE}"
