"""What a trainer asks of what it is given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topkast_func.checks import check_callable, check_count, check_type
from topkast_func.devices import check_device
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
        TypeError: It is no optimiser, or the network no module.
        ValueError: It is missing or one of another network, or the network was made sparse by
            `sparsify`, or made under `torch.inference_mode`, or is on the meta device.
    """
    check_type("net", net, nn.Module)
    if optimizer is None:
        raise ValueError("optimizer is missing: pass one built from net.parameters()")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    if len(sparse_layers(net)) < sum(bool(weights_of(module)) for module in net.modules()):
        raise ValueError(
            "net was made sparse by sparsify, which keeps a schedule of its own: train it in a "
            "loop that calls its step(), or build net of layers such as TopKastLinear"
        )
    for name, parameter in net.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name!r} of net is on the meta device, and holds no values")
        if parameter.is_inference():
            raise ValueError(
                f"{name!r} of net was made under torch.inference_mode(), and cannot be trained: "
                "build net outside of it"
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


def check_callbacks(callbacks: Sequence[Callable[..., Any]]) -> None:
    """Check that callbacks are functions.

    Args:
        callbacks: The callbacks.

    Raises:
        TypeError: They are no sequence, or one of them cannot be called.
    """
    check_type("callbacks", callbacks, Sequence, ": pass functions in a list, such as [f]")
    for place, callback in enumerate(callbacks):
        check_callable(f"callbacks[{place}]", callback)


def device_of(device: torch.device | str | None) -> torch.device:
    """Return the device to train on.

    Args:
        device: The device that was given, or its name; None for the GPU if there is one.

    Returns:
        The device.

    Raises:
        ValueError: It is not there, or is the meta device.
    """
    check_device("device", device)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def trainable(loss: Tensor) -> Tensor:
    """Return what a loss function returned, if it can be differentiated.

    Args:
        loss: What it returned.

    Returns:
        The same.

    Raises:
        TypeError: It is no tensor, or none of one entry.
        ValueError: It does not depend on what is trained.
    """
    check_type("what loss returns", loss, Tensor, ": a scalar one, to be differentiated")
    if loss.numel() != 1:
        raise TypeError(f"loss must return a scalar, got a tensor of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on what is trained: detach nothing, nor compute under "
            "torch.no_grad(), on the way to it, and let parameters of net require a gradient"
        )
    return loss
