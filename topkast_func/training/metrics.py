"""What a step tells its caller."""

from typing import Any, NamedTuple

from torch import Tensor


class StepMetrics(NamedTuple):
    """What a step tells its caller, 0-d tensors.

    Attributes:
        loss: data_loss + λ·penalty.
        data_loss: The loss that ``loss_fn`` returned.
        penalty: The exploration penalty without its weight λ: what the loss holds is
            ``config.penalty_weight * penalty``. (`Sparsifier.penalty` is with λ.)
        grad_norm: Euclidean norm of the gradient of the loss over B and the dense parameters, in
            float32 at the least.
        refreshed: Whether the sets were chosen anew, before the step or at its end, bool.
        aux: What ``loss_fn`` returned beside the loss; () where it returned nothing else.
    """

    loss: Tensor
    data_loss: Tensor
    penalty: Tensor
    grad_norm: Tensor
    refreshed: Tensor
    aux: Any
