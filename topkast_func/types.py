"""Names for what travels through the library: parameter trees, models, losses, sets."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from torch import Tensor, nn

Params: TypeAlias = Mapping[str, Tensor]
"""Weights by name, as ``dict(module.named_parameters())`` gives them."""

Tensors: TypeAlias = dict[str, Tensor]
"""A parameter tree, or a tree with one tensor per parameter, owned by the library."""

Model: TypeAlias = nn.Module | Callable[..., Any]
"""A module, or a pure function ``apply(params, *inputs)``."""

LossFn: TypeAlias = Callable[[Callable[..., Any], Any], Any]
"""``loss_fn(apply, batch)``: the scalar loss of a batch under the bound ``apply``, or a pair of it
and a tree of tensors."""

BlockNorm: TypeAlias = Literal["l2", "l1"]
"""By which norm blocks are ranked."""

Fields = TypeVar("Fields")
"""A named tuple."""


class Masks(NamedTuple):
    """The two sets of one parameter.

    Attributes:
        forward: 1_A, bool, the shape of the parameter.
        backward: 1_B, bool, the shape of the parameter; contains the forward mask.
    """

    forward: Tensor
    backward: Tensor


def changed(fields: Fields, **new: Any) -> Fields:
    """Do what ``_replace`` does, of which Dynamo in torch 2.11 makes an empty tuple.

    Args:
        fields: A named tuple.
        **new: Fields that are others.

    Returns:
        The tuple with these.
    """
    return type(fields)(**{**fields._asdict(), **new})  # type: ignore[attr-defined]
