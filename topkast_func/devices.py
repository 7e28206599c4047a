"""Where tensors can be put."""

import torch


def check_device(name: str, device: torch.device | str | None) -> None:
    """Check that a device is there, and holds values.

    Args:
        name: What it is called in the error.
        device: The device, or its name; None for none in particular.

    Raises:
        ValueError: It is not there, or is the meta device.
    """
    if device is None:
        return
    try:
        made = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as reason:
        told = str(reason).splitlines()[0]
        raise ValueError(f"{name} must be a device that is there, got {device!r}: {told}") from None
    if made.is_meta:
        raise ValueError(f"{name} must be a device that holds values, which 'meta' does not")
