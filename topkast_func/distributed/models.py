"""The parts of a model that concern ranks: buffers to average, and facts that must agree."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.model.modules import buffers_of, tensors_of

PLACES = r"0x[0-9a-f]+|\b(GPU |cuda:)\d+"
"""What a module may print that differs by process: addresses and devices."""


def averaged_buffers(model: object) -> dict[str, Tensor]:
    """Return the buffers of a module that ranks average, by name: the floating ones it saves."""
    if not isinstance(model, nn.Module):
        return {}
    kept = model.state_dict(keep_vars=True)
    return {n: buffer for n, buffer in buffers_of(model).items() if n in kept and is_mean(buffer)}


def is_mean(tensor: Tensor) -> bool:
    """Return whether a tensor can be averaged."""
    return tensor.is_floating_point() or tensor.is_complex()


def about(model: object) -> dict[str, Any]:
    """Return the facts about a model and the installed torch that must agree on all ranks."""
    tensors = tensors_of(model)
    parts = re.sub(PLACES, "", repr(model)) if isinstance(model, nn.Module) else ""
    return {
        "torch": str(torch.__version__),
        "the model": {n: (tuple(t.shape), str(t.dtype)) for n, t in tensors.items()},
        "the parts of the model": parts,
    }


def check_unsynced(model: object) -> None:
    """Check that no part of a model sends anything itself.

    Args:
        model: A module, or anything else.

    Raises:
        ValueError: One does.
    """
    synced = [
        name
        for name, part in (model.named_modules() if isinstance(model, nn.Module) else ())
        if isinstance(part, nn.SyncBatchNorm)
    ]
    if synced:
        raise ValueError(
            f"the parts {synced} of the model are SyncBatchNorm, which sends within what is "
            "differentiated: use BatchNorm; its running statistics are averaged over the ranks"
        )
