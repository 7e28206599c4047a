"""`torch.nn.MultiheadAttention` in an ordinary loop, its projections on the kernels."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from topkast_func.facade.sparse_layer import ForwardPass, SparseLayer
from topkast_func.facade.sparse_linear import on_kernels
from topkast_func.model.attention import attended


class SparseAttention(SparseLayer):
    """Mixed into the attention: kernels compute what `attended` does, torch all else with α."""

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
        """Compute with α, on the kernels or densely."""
        out: Any = self.out_proj
        told = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        ours = on_kernels(self, "in_proj_weight", "in_proj_bias")
        ours_out = on_kernels(out, "weight", "bias")
        found = None
        if ours or ours_out:
            project = ours or _product(self, "in_proj_weight", "in_proj_bias")
            project_out = ours_out or _product(out, "weight", "bias")
            found = attended(self, project, project_out, (query, key, value), told)
        result: tuple[Tensor, Tensor | None]
        result = found or super().forward(query, key, value, *told)
        return result


def _product(layer: nn.Module, key: str, bias: str) -> Callable[[Tensor], Tensor]:
    """Return the product of a layer with α of a weight as torch computes it."""

    def multiply(x: Tensor) -> Tensor:
        with ForwardPass():
            return functional.linear(x, getattr(layer, key), getattr(layer, bias))

    return multiply
