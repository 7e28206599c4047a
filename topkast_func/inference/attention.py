"""`torch.nn.MultiheadAttention` for inference, its four projections layers of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from topkast_func.kernels.linear import check_inputs
from topkast_func.model.attention import mask_problem, mixed


class SparseAttention(nn.Module):
    """Computes what `torch.nn.MultiheadAttention` does, whatever attends to what.

    Args:
        layer: The attention.
        projections: Of queries, keys, values, and of what comes out: `SparseLinear` or
            `torch.nn.Linear`.

    Attributes:
        q_proj: The first.
        k_proj: The second.
        v_proj: The third.
        out_proj: The fourth.
    """

    in_proj_bias = None
    """Tells `torch.nn.TransformerEncoder` that this is not what its short cut reads."""

    def __init__(self, layer: nn.MultiheadAttention, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.num_heads, self.batch_first = layer.num_heads, layer.batch_first
        self.embed_dim, self.dropout = layer.embed_dim, layer.dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections

    @property
    def in_proj_weight(self) -> Tensor:
        """The weights of queries, keys and values, dense, [3·embed_dim, embed_dim]."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])  # type: ignore[list-item]

    def forward(
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
        """Return what `torch.nn.MultiheadAttention` returns.

        Args:
            query: [batch, length, embed_dim], or without batch; length first unless
                ``batch_first``.
            key: The same, of a length of its own.
            value: As ``key``.
            key_padding_mask: [batch, length of the keys]: True, or −∞, for those to be ignored.
            need_weights: Whether to return the weights.
            attn_mask: [length, length of the keys], or one for each head of each sample: True for
                pairs that may not attend, or what is added to their scores.
            average_attn_weights: Whether the weights are the mean over the heads.
            is_causal: Whether ``attn_mask`` is the causal mask.

        Returns:
            The output, as ``query``, and the weights, or None.

        Raises:
            TypeError: A mask is of integers, or an input no strided tensor, a nested one say.
            ValueError: ``is_causal`` without an ``attn_mask``, or inputs and masks whose shapes do
                not go together.
        """
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        for name, mask in masks.items():
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name} must be of bool or floating point, got {mask.dtype}")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says what attn_mask is: give that too")
        for x in (query, key, value):
            check_inputs(x, self.embed_dim)
        alone, lengths = query.dim() == 2, self.batch_first
        shapes = [(*x.shape[:-1],) for x in (query, key, value)]
        sizes = [(1, *shape) if alone else shape if lengths else shape[::-1] for shape in shapes]
        if {*map(len, sizes)} != {2} or sizes[0][0] != sizes[1][0] or sizes[1] != sizes[2]:
            raise ValueError(f"query, key and value are of shapes {shapes}, but for their features")
        (batch, length), (_, keys), _ = sizes
        parts = []
        for x, project in ((query, self.q_proj), (key, self.k_proj), (value, self.v_proj)):
            x = x[None] if alone else x if lengths else x.transpose(0, 1)
            parts.append(project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        padding = key_padding_mask
        padding = padding[None] if alone and padding is not None else padding
        if problem := mask_problem(attn_mask, padding, (batch, self.num_heads, length, keys)):
            raise ValueError(problem)
        joined, weights = mixed(self, parts, attn_mask, padding, is_causal, need_weights)
        y = self.out_proj(joined)
        y = y[0] if alone else y if lengths else y.transpose(0, 1)
        if weights is None:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights[0] if alone else weights
