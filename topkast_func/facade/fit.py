"""What a trainer asks of a network and its optimiser."""

from torch import nn
from torch.optim import Optimizer

from topkast_func.facade.sparse_weight import weights_of
from topkast_func.facade.topkast_layer import TopKastLayer


def sparse_layers(net: nn.Module) -> list[TopKastLayer]:
    """Return the layers of a network that choose their sets when they are told to."""
    return [module for module in net.modules() if isinstance(module, TopKastLayer)]


def check_fit(optimizer: Optimizer | None, net: nn.Module) -> Optimizer:
    """Check that an optimiser is one of a network whose sets a trainer can choose.

    Args:
        optimizer: The optimiser.
        net: The network.

    Returns:
        The optimiser.

    Raises:
        TypeError: It is no optimiser.
        ValueError: It is missing or one of another network, or the network was made sparse by
            `sparsify`.
    """
    if optimizer is None:
        raise ValueError("optimizer is missing: pass one built from net.parameters()")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    if len(sparse_layers(net)) < sum(bool(weights_of(module)) for module in net.modules()):
        raise ValueError(
            "net was made sparse by sparsify, which keeps a schedule of its own: train it in a "
            "loop that calls its step(), or build net of layers such as TopKastLinear"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in net.parameters()):
        raise ValueError(
            "the optimizer holds no parameter of net: build it from net.parameters(), of the very "
            "net that is trained"
        )
    return optimizer
