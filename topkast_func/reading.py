"""Whether a tensor has numbers that the host can read, and whether they are others by now."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._functorch import is_functorch_wrapped_tensor

_FAKE = _TorchDispatchModeKey.FAKE


def dispatches(tensor: Tensor) -> bool:
    """Return whether the class of a tensor overrides how operations on it are computed."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor without its subclass, if that changes nothing of how it is computed.

    Dynamo would not follow this for one without any.
    """
    if type(tensor) is Tensor or dispatches(tensor):
        return tensor
    return tensor.as_subclass(Tensor)


def readable(tensor: Tensor) -> bool:
    """Return whether the host can read the numbers of a tensor."""
    other = dispatches(tensor) or tensor.is_meta or is_functorch_wrapped_tensor(tensor)
    return not other and _get_dispatch_mode(_FAKE) is None


def check_numbers(what: str) -> None:
    """Check that tensors have numbers, which those under `FakeTensorMode` have not.

    Args:
        what: Who needs them.

    Raises:
        RuntimeError: The mode is on.
    """
    if _get_dispatch_mode(_FAKE) is not None:
        raise RuntimeError(
            f"{what} reads the numbers of weights, and there are none under FakeTensorMode: call "
            "it before; the forward and backward pass of a sparse model run under it"
        )


def version(tensor: Tensor) -> int | None:
    """Return a number that is another after a write; None of an inference tensor."""
    return None if tensor.is_inference() else tensor._version


class AsTheyAre(NamedTuple):
    """Tensors as they are, held weakly.

    Attributes:
        references: To them.
        versions: See `version`.
    """

    references: tuple["ref[Tensor]", ...]
    versions: tuple[int | None, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "AsTheyAre":
        """Return those of tensors."""
        return cls(tuple(map(ref, tensors)), tuple(map(version, tensors)))

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors are these, in this order, and no write to one was counted."""
        return self.versions == tuple(map(version, tensors)) and all(
            reference() is tensor
            for reference, tensor in zip(self.references, tensors, strict=True)
        )


def versions(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Return what `version` does, by name; nothing in a graph."""
    if torch.compiler.is_compiling():
        return {}
    return {name: version(t) for name, t in tensors.items()}
