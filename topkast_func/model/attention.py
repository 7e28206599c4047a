"""`torch.nn.MultiheadAttention` with its projections on the kernels."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from topkast_func.model.stand_in import StandIn, calls_its_own, computes_as


class AttentionStandIn(StandIn):
    """Stands in for `torch.nn.MultiheadAttention` where a batch attends to itself.

    Else, and where weights of the attention are asked for, the layer computes with α.
    """

    weights = ("in_proj_weight", "out_proj.weight")

    @staticmethod
    def is_of(kind: type) -> bool:
        """Return whether layers of a class compute as this does."""
        return computes_as(kind, nn.MultiheadAttention)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether this computes what the layer does, as that is now."""
        return super().fits(layer) and _projects_at_once(layer)

    def compute(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the layer returns."""
        layer, (product, product_out) = self.layer, self.products
        told = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        found = attended(
            layer,
            lambda x: product(x, layer.in_proj_weight, layer.in_proj_bias),
            lambda x: product_out(x, layer.out_proj.weight, layer.out_proj.bias),
            (query, key, value),
            told,
        )
        result: tuple[Tensor, Tensor | None]
        result = found or type(layer).forward(layer, query, key, value, *told)
        return result


def attended(
    layer: Any,
    project: Callable[[Tensor], Tensor],
    project_out: Callable[[Tensor], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    told: tuple[Tensor | None, bool, Tensor | None, bool, bool],
) -> tuple[Tensor, None] | None:
    """Compute what `torch.nn.MultiheadAttention` does where a batch attends to itself.

    Args:
        layer: The attention, which projects to queries, keys and values at once.
        project: Does that.
        project_out: Projects what comes out.
        inputs: Its ``query``, ``key`` and ``value``.
        told: The other inputs, in the order of the layer.

    Returns:
        What the layer returns; None where one attends to another, weights are asked for, or a mask
        does not fit, which torch has words for.
    """
    (query, key, value), (padding, need_weights, attn_mask, _, is_causal) = inputs, told
    itself = query is key and key is value and query.dim() == 3 and not query.is_nested
    if not itself or need_weights or (is_causal and attn_mask is None):
        return None
    batch, length = query.shape[:2] if layer.batch_first else (query.shape[1], query.shape[0])
    misfit = mask_problem(attn_mask, padding, (batch, layer.num_heads, length, length))
    if misfit or not _projects_at_once(layer):
        return None
    projected = project(query if layer.batch_first else query.transpose(0, 1))
    size = (batch, length, 3, layer.num_heads, -1)
    parts = projected.view(size).permute(2, 0, 3, 1, 4)
    joined, _ = mixed(layer, parts, attn_mask, padding, is_causal)
    y = project_out(joined)
    return y if layer.batch_first else y.transpose(0, 1), None


def _projects_at_once(layer: Any) -> bool:
    """Return whether an attention projects to queries, keys and values at once, and no more."""
    return (
        layer.in_proj_weight is not None
        and layer.bias_k is None
        and not layer.add_zero_attn
        and not calls_its_own(layer)
    )


def mask_problem(
    attention: Tensor | None, padding: Tensor | None, sizes: tuple[int, int, int, int]
) -> str | None:
    """Say why a mask does not fit, if one does not.

    Args:
        attention: The ``attn_mask``.
        padding: The ``key_padding_mask``.
        sizes: Batch, heads, length, and length of the keys.

    Returns:
        One line, or None.
    """
    batch, heads, length, keys = sizes
    shapes = (length, keys), (batch * heads, length, keys)
    for name, mask, allowed in (
        ("attn_mask", attention, shapes),
        ("key_padding_mask", padding, [(batch, keys)]),
    ):
        if mask is not None and tuple(mask.shape) not in allowed:
            listed = " or ".join(map(str, allowed))
            return f"{name} must be of shape {listed}, got {tuple(mask.shape)}"
    return None


def mixed(
    layer: Any,
    parts: Iterable[Tensor],
    attention: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Average values, weighted by how much queries attend to keys.

    Args:
        layer: The `torch.nn.MultiheadAttention`, or what has its ``num_heads``, ``dropout`` and
            ``training``.
        parts: Queries, keys and values, [batch, heads, length, depth].
        attention: Its ``attn_mask``.
        padding: Its ``key_padding_mask``.
        is_causal: Whether ``attention`` is the causal mask.
        need_weights: Whether the weights of the heads are to be returned.

    Returns:
        What is to be projected, [batch, length, heads·depth], and the weights, [batch, heads,
        length, length of the keys], or None.
    """
    q, k, v = parts
    causal = is_causal and padding is None and not need_weights
    mask = None if causal else _added(attention, padding, layer.num_heads, q.dtype)
    dropped = layer.dropout if layer.training else 0.0
    if not need_weights:
        y = functional.scaled_dot_product_attention(q, k, v, mask, dropped, causal)
        return y.transpose(1, 2).flatten(2), None
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    weights = functional.softmax(scores if mask is None else scores + mask, -1)
    weights = functional.dropout(weights, dropped, layer.training)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def _added(
    attention: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Return what is added to the scores [batch, heads, length, length]: −∞ where a mask holds."""
    masks = []
    if attention is not None:
        masks.append(
            attention if attention.dim() == 2 else attention.view(-1, heads, *attention.shape[1:])
        )
    if padding is not None:
        masks.append(padding[:, None, None])
    floats = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask.to(dtype)
        for mask in masks
    ]
    return sum(floats[1:], floats[0]) if floats else None
