"""What a trainer asks of what it is given."""

from torch import nn
from torch.optim import Optimizer

from topkast_func.checks import check_count
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


def count_or(name: str, value: int | None, default: int, low: int = 1) -> int:
    """Return a whole number that was given.

    Args:
        name: What it is called in the error.
        value: The number, or None.
        default: What None stands for; at least 1 is taken.
        low: Lowest value allowed.

    Returns:
        The number, or the default.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below ``low``.
    """
    return max(1, default) if value is None else check_count(name, value, low)


def explored(num_epochs_explore: int | None, num_epochs: int) -> int:
    """Return the number of epochs that choose sets anew each time.

    Args:
        num_epochs_explore: The number that was given; None for a tenth of all, at least one.
        num_epochs: Most epochs to train.

    Returns:
        The number.

    Raises:
        TypeError: It is no integer.
        ValueError: It is outside [0, num_epochs].
    """
    epochs = count_or("num_epochs_explore", num_epochs_explore, num_epochs // 10, 0)
    if epochs > num_epochs:
        raise ValueError(
            f"num_epochs_explore must be in [0, num_epochs={num_epochs}], got {num_epochs_explore}"
        )
    return epochs
