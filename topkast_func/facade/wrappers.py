"""Which DistributedDataParallel runs a sparse weight, as it is seen in forward passes."""

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch.nn.parallel import DistributedDataParallel

_LAST: WeakKeyDictionary[Any, ref[DistributedDataParallel]] = WeakKeyDictionary()


def note_wrapper(weight: object) -> None:
    """Take note of what runs the forward pass that reads a weight, if that is one."""
    running = DistributedDataParallel._active_ddp_module
    if running is not None:
        _LAST[weight] = ref(running)


def wrapper_of(weight: object) -> DistributedDataParallel | None:
    """Return what last ran a weight; None for none, or where that is gone."""
    found = _LAST.get(weight)
    return None if found is None else found()
