"""Tensors of a module that are views of one another's memory, which a step takes apart."""

from collections import defaultdict
from collections.abc import Collection
from itertools import permutations
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from topkast_func.model.modules import tensors_of
from topkast_func.reading import readable

OVERLAPS = (
    "{0!r} and {1!r} of the model are views of one memory, and {0!r} changes in training: a step "
    "has each as a tensor of its own. Keep the larger one alone, and take the other out of it in "
    "the forward pass"
)


def check_overlaps(model: object, changed: Collection[str]) -> None:
    """Check that no tensor of a module that changes shares memory with another.

    Args:
        model: A module, or anything else.
        changed: Names of its parameters and buffers that training or the forward pass changes.

    Raises:
        ValueError: One does.
    """
    in_storage: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors_of(model).items():
        if readable(tensor):
            in_storage[tensor.untyped_storage()._cdata][name] = tensor
    for together in in_storage.values():
        for (name, tensor), (other, found) in permutations(together.items(), 2):
            apart = tensor is found or name not in changed
            if not apart and np.shares_memory(_outline(tensor), _outline(found)):
                raise ValueError(OVERLAPS.format(name, other))


def _outline(tensor: Tensor) -> NDArray[np.void]:
    """Return an array where a tensor is, on whatever device: nothing is read."""
    size = tensor.element_size()
    interface = {
        "data": (tensor.data_ptr(), False),
        "shape": tuple(tensor.shape),
        "strides": tuple(size * stride for stride in tensor.stride()),
        "typestr": f"|V{size}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
