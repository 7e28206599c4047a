"""A loss that carries the seed's penalty on all weights that take part."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.checks import check_callable, check_fraction, check_type
from topkast_func.facade.sparse_weight import weights_of
from topkast_func.penalty import group_l2, widened


class TopKastLoss(nn.Module):
    """loss(ŷ, y) + alpha · Σ over layers of the norm of their weights.

    A sparse weight counts with ‖θ_A‖₂ + ‖θ_{B∖A}‖₂ / D (`group_l2`), every other parameter
    ``weight`` of a module with its plain norm; one that layers share counts once. Those of half
    precision are summed in float32.

    Args:
        loss: A loss class such as `torch.nn.MSELoss`, which is called without arguments, or a
            loss function ``(y_hat, y) -> scalar``.
        net: The network whose weights are penalised, at any depth.
        alpha: Weight λ of the penalty, in [0, 1].
        device: Accepted for the seed's sake; the penalty is computed where the weights are.

    Attributes:
        loss: The loss without penalty.

    Raises:
        TypeError: ``alpha`` is no number, ``loss`` cannot be called (or its class takes arguments),
            or ``net`` is no module.
        ValueError: ``alpha`` is outside [0, 1].

    Departures:
        The seed sees direct children only.

    Example:
        >>> from topkast_func import TopKastLinear
        >>> net = nn.Sequential(TopKastLinear(4, 1, 0.5, 0.25))
        >>> TopKastLoss(nn.MSELoss, net, alpha=0.1)(net(torch.ones(2, 4)), torch.zeros(2, 1)).shape
        torch.Size([])
    """

    loss: Callable[[Any, Any], Tensor]

    def __init__(
        self,
        loss: Callable[..., Any],
        net: nn.Module,
        alpha: float = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_type("net", net, nn.Module)
        self.loss = loss_of(loss)
        self.net = net
        self.alpha = check_fraction("alpha", alpha)
        self.device = device

    def compute_norm_active_set(self) -> Tensor:
        """Sum the norms over the modules of the network.

        Returns:
            The penalty before its weight, 0-d.
        """
        norms = [*_norms(self.net)]
        none = torch.zeros((), dtype=torch.float32, device=self.device or "cpu")
        return torch.stack(norms).sum() if norms else none

    def forward(self, y_hat: Any, y: Any) -> Tensor:
        """Return the penalised loss.

        Args:
            y_hat: Output of the network.
            y: Target, as the loss takes it.

        Returns:
            The penalised loss, 0-d.
        """
        return self.loss(y_hat, y) + self.alpha * self.compute_norm_active_set()


def loss_of(loss: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Return a loss function.

    Args:
        loss: The function, or its class, which is called without arguments.

    Returns:
        The function, or an instance of the class.

    Raises:
        TypeError: It cannot be called, or the class takes arguments.
    """
    try:
        made = loss() if isinstance(loss, type) else loss
    except TypeError as reason:
        raise TypeError(
            f"loss must be a function (y_hat, y) -> scalar, or a class of such without arguments, "
            f"got {loss.__name__}: {reason}"
        ) from reason
    check_callable("loss", made)
    return made


def _norms(net: nn.Module) -> Iterator[Tensor]:
    """Yield the norm of each weight of a network."""
    seen: set[int] = set()
    for module in net.modules():
        weights = weights_of(module)
        for key in dict.fromkeys((*weights, "weight")):
            raw = module._parameters.get(key)
            if raw is None or id(raw) in seen:
                continue
            seen.add(id(raw))
            if key in weights:
                active, exploring = map(widened, weights[key].parts(module))
                yield group_l2(active, exploring, weights[key].rule.allocation.forward_density)
            else:
                yield torch.linalg.vector_norm(widened(raw))
