"""Values of what is on the meta device, made when they are asked for, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.random import fork_rng

from topkast_func.leaves import check_plain, check_present, check_strided
from topkast_func.trees import check_text
from topkast_func.types import Params, Tensors

Materialize: TypeAlias = Callable[[str, Tensor], Tensor]
"""``materialize(name, tensor)``: the values of a tensor on the meta device."""


IN_PARTS = (
    ", since neither files nor compiled steps take any other; a sparse one can be put together of "
    "its indices and values in the forward pass"
)


class Source:
    """Where the values of tensors come from: from themselves, or from a function.

    Args:
        tensors: All the tensors that there are, by name.
        materialize: The function, for those on the meta device; None where there are none.
        seed: Seed of the random numbers that it draws.

    Raises:
        TypeError: ``materialize`` is not callable, or a tensor is sparse or nested.
        ValueError: A tensor has no values and there is no function, or the other way round; or a
            name cannot be written to files.
    """

    def __init__(self, tensors: Params, materialize: Materialize | None, seed: int) -> None:
        if materialize is not None and not callable(materialize):
            raise TypeError(f"materialize must be a function, got {materialize!r}")
        check_text("the model", tensors)
        for name, tensor in tensors.items():
            check_strided(repr(name), tensor, IN_PARTS)
        if materialize is None:
            for name, tensor in tensors.items():
                check_present(name, tensor)
        elif not any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(
                "materialize is for tensors on the meta device, and all have values: leave it out, "
                "or make the module under torch.device('meta')"
            )
        self._materialize, self._seed = materialize, seed

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Return the values of a tensor.

        Args:
            name: Its name.
            tensor: The tensor.

        Returns:
            The values: itself, if it has any.

        Raises:
            TypeError: The function returned no tensor, a sparse or nested one, or one that computes
                in a way of its own.
            ValueError: It returned one without values, or of another shape or dtype.
        """
        if self._materialize is None or not tensor.is_meta:
            return tensor
        outline = tensor.detach()
        with _drawing(self._seed, name):
            found = self._materialize(name, outline)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"materialize must return a tensor, and returned {found!r} for {name!r}"
            )
        what = f"what materialize returned for {name!r}"
        check_strided(what, found)
        check_plain(what, found)
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"materialize returned shape {tuple(found.shape)} and {found.dtype} for {name!r}, "
                f"which has shape {tuple(tensor.shape)} and {tensor.dtype}"
            )
        if found.is_meta:
            raise ValueError(
                f"materialize returned {name!r} on the meta device, without values: make them by "
                "torch.empty_like(tensor, device='cpu') and the like"
            )
        return found.detach()

    def copied(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return copies of the values of tensors, without their subclasses."""
        return {n: self(n, t).detach().as_subclass(Tensor).clone() for n, t in tensors.items()}


@contextmanager
def _drawing(seed: int, name: str) -> Iterator[None]:
    """Draw random numbers that follow from the arguments alone; leave the caller's as they are."""
    digest = int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "big")
    own = int(np.random.SeedSequence((seed, digest)).generate_state(1, np.uint64)[0])
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with fork_rng(devices):
        torch.default_generator.manual_seed(own)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(own)
        yield
