"""Tensors that are put together when they are first read."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Deferred(Tensor):
    """A tensor without memory until an operator reads it, which then gets the real one.

    That happens below autograd, so that gradients, versions and views are those of any tensor.
    """

    _make: Callable[[], Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(shape: Sequence[int], like: Tensor, make: Callable[[], Tensor]) -> "Deferred":
        """Return a tensor to be made.

        Args:
            shape: Its shape; it is contiguous.
            like: A tensor of its dtype and device.
            make: Makes it, once.

        Returns:
            The tensor.
        """
        found: Deferred = Tensor._make_wrapper_subclass(
            Deferred, shape, dtype=like.dtype, device=like.device
        )
        found._make = make
        return found

    @cached_property
    def content(self) -> Tensor:
        """The tensor."""
        return self._make()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute with the real tensor; what is written to is returned as it was given."""
        given, named = tree_map_only(Deferred, lambda t: t.content, (args, dict(kwargs or {})))
        result = func(*given, **named)
        written = args[0] if args and isinstance(args[0], Deferred) else None
        return written if written is not None and result is written.content else result

    def numpy(self, *, force: bool = False) -> Any:
        """Return the array of the real tensor."""
        return self.view_as(self).numpy(force=force)

    def tolist(self) -> Any:
        """Return the numbers of the real tensor."""
        return self.view_as(self).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy the real tensor."""
        return copy.deepcopy(self.clone(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the real tensor."""
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Give torch.compile the real tensor."""
        return ["content"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], _: None, size: Sequence[int], stride: Sequence[int]
    ) -> "Deferred":
        """Return the tensor of a real one."""
        return Deferred.of(size, inner["content"], lambda: inner["content"])
