"""Which weights of a state are stored sparsely for inference, and how."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from topkast_func.inference.linear import SparseLinear
from topkast_func.kernels.inference import pays
from topkast_func.kernels.pattern import block_of
from topkast_func.report.export import bsr, csr
from topkast_func.types import Params


class Stored(NamedTuple):
    """What sparse layers are made of.

    Attributes:
        alpha: α by name.
        masks: 1_A by name; dense parameters are absent.
        values: Values as the state stores them, by name: in the blocks that A is made of.
        batch: Rows of activations that a layer sees at a time.
    """

    alpha: Params
    masks: Mapping[str, Tensor]
    values: Params
    batch: int

    def linear(
        self,
        name: str | None,
        bias: Tensor | None,
        rows: slice = slice(None),
        transposed: bool = False,
    ) -> SparseLinear | None:
        """Make a linear layer of a weight, or of some of its rows.

        Args:
            name: The weight, or None of none; axes after the first are taken as one.
            bias: [out_features], or None.
            rows: The rows.
            transposed: Whether the weight is [in_features, out_features].

        Returns:
            The layer; None where it does not pay, or the weight is dense.
        """
        if name is None or name not in self.masks:
            return None
        whole = self.alpha[name].detach()
        alpha, mask = whole.flatten(1)[rows], self.masks[name].flatten(1)[rows]
        block = block_of(self.values[name]) if whole.ndim == 2 else (1, 1)
        if transposed:
            alpha, mask, block = alpha.t(), mask.t(), block[::-1]
        shape = alpha.shape[0], alpha.shape[1]
        if not pays(shape, int(mask.sum()), self.batch, alpha.dtype, alpha.device.type):
            return None
        divided = not any(side % of for side, of in zip(shape, block, strict=True))
        matrix = bsr(block, alpha, mask) if divided and block != (1, 1) else csr(alpha, mask)
        return SparseLinear(matrix, bias)
