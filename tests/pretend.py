"""An accelerator that is none: real numbers on the CPU behind the rules of a device of its own.

A tensor on it refuses to meet one that is elsewhere, and what makes the host wait for it is
noted, with the line of the library that asked. Operators of the library run their own code.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo  # noqa: F401  (before a function is patched that it knows as an object)
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import topkast_func
from topkast_func import leaves, reading
from topkast_func.reading import dispatches
from topkast_func.training import compilation

DEVICE = torch.device("lazy:0")
"""Of a kind that torch has no kernels for, and whose gradients it takes in the caller's thread."""

ROOT = str(Path(topkast_func.__file__).parent)

READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "unique_dim"}
"""What returns a number to the host, or a tensor of a size that depends on numbers."""


class Wait(NamedTuple):
    """A place where the host waited: file and function of the library, and what it asked for."""

    where: str
    operator: str


WAITS: list[Wait] = []


class MixedError(RuntimeError):
    """Tensors of two devices have met."""


class Pretended(Tensor):
    """A tensor on the device that is none."""

    raw: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.raw = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.raw})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with _Mode():  # type: ignore[no-untyped-call]
            return operator(*args, **(kwargs or {}))


def on_cpu(tree: Any) -> Any:
    """Return a tree with its tensors on the CPU, unseen."""
    return tree_map_only(Pretended, _raw, tree)


@contextmanager
def pretending() -> Iterator[torch.device]:
    """Let there be such a device, on which nobody has waited yet."""
    WAITS.clear()
    with ExitStack() as patched:
        for module in (leaves, compilation, reading):
            patched.enter_context(patch.object(module, "dispatches", _dispatches))
        patched.enter_context(patch.object(torch, "is_autocast_enabled", _casts))
        patched.enter_context(_Mode())  # type: ignore[no-untyped-call]
        yield DEVICE


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, Pretended) else tensor


def _mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Change each tensor among the arguments of an operator, in lists too: pytrees take longer."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _mapped(change, part) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_mapped(change, part) for part in tree])
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(lambda t: found.append(t) or t, tree)  # type: ignore[func-returns-value]
    return found


def _casts(kind: str, ask: Callable[[str], bool] = torch.is_autocast_enabled) -> bool:
    return kind != DEVICE.type and ask(kind)


def _dispatches(tensor: Tensor) -> bool:
    return not isinstance(tensor, Pretended) and dispatches(tensor)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        there = asked is not None and torch.device(asked).type == DEVICE.type
        if Pretended not in types and not there:
            return operator(*args, **kwargs)
        if operator.namespace == "topkast_func":
            with self:
                return operator._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        tensors = _tensors((args, kwargs))
        ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        name = operator._schema.name.removeprefix("aten::")
        here = bool(ours) if asked is None else there
        if here and asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "_to_copy":
            if ours and not here:
                _note(name)
            elif ours and asked is None:
                here = True
            elif here and not ours and args[0].ndim and not kwargs.get("non_blocking"):
                _note(name)
            found = operator(*_mapped(_raw, args), **kwargs)
            return Pretended(found) if here else found
        if name == "copy_":
            if ours and not isinstance(args[0], Pretended):
                _note(name)
            operator(*_mapped(_raw, args), **kwargs)
            return args[0]
        if ours:
            _refuse_strangers(operator, tensors)
            if name in READS or _selects(name, args, kwargs):
                _note(name)
        return _wrapped(operator, args, kwargs, here)


def _refuse_strangers(operator: Any, tensors: list[Tensor]) -> None:
    """Let in from elsewhere only a number that a kernel takes as an argument."""
    numbers = torch.Tag.pointwise in operator.tags or "index_put" in operator._schema.name
    for tensor in tensors:
        if not isinstance(tensor, Pretended) and (tensor.ndim or not numbers):
            raise MixedError(f"{operator}: {[(t.device.type, tuple(t.shape)) for t in tensors]}")


def _selects(name: str, args: Any, kwargs: Any) -> bool:
    """Say whether the size of what an operator handles depends on the numbers in a mask."""
    if name.startswith("index"):
        return any(i.dtype == torch.bool for i in _tensors(args[1:2]))
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _wrapped(operator: Any, args: Any, kwargs: Any, here: bool) -> Any:
    found = operator(*_mapped(_raw, args), **_mapped(_raw, kwargs))
    if not here:
        return found
    known = {id(t.raw): t for t in _tensors((args, kwargs)) if isinstance(t, Pretended)}
    wrapped = _mapped(lambda t: known[id(t)] if id(t) in known else Pretended(t), found)
    if all(argument.alias_info is None for argument in operator._schema.arguments):
        return wrapped
    return return_and_correct_aliasing(operator, args, kwargs, wrapped)  # type: ignore[no-untyped-call]


def _note(operator: str) -> None:
    """Note a wait that the library has asked for; those of the tests are their own."""
    frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
    if code := next((code for code in frames if code.co_filename.startswith(ROOT)), None):
        path = Path(code.co_filename).relative_to(ROOT)
        WAITS.append(Wait(f"{path.with_suffix('').as_posix()}.{code.co_name}", operator))
