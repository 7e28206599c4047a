"""Names for what travels through the library: parameter trees, models, losses."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

Params: TypeAlias = Mapping[str, Tensor]
"""Weights by name, as ``dict(module.named_parameters())`` gives them."""

Tensors: TypeAlias = dict[str, Tensor]
"""A parameter tree, or a tree with one tensor per parameter, owned by the library."""

Model: TypeAlias = nn.Module | Callable[..., Any]
"""A module, or a pure function ``apply(params, *inputs)``."""

LossFn: TypeAlias = Callable[[Callable[..., Any], Any], Tensor]
"""``loss_fn(apply, batch)``: the scalar loss of a batch under the bound ``apply``."""
