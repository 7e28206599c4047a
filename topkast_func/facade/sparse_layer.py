"""Layers that keep θ in an ordinary parameter and compute with α.

While a forward pass of such a layer or of what holds it runs, in the thread that runs it, the
attribute of a sparse weight reads as α, whoever reads it (`torch.nn.MultiheadAttention` reads the
weight of its output projection). So it does in a backward pass, where checkpoints compute anew. At
any other time, and in ``parameters()`` always, it is θ.
"""

import threading
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from topkast_func.facade.dense_gradient import kept_in_step
from topkast_func.facade.derived import UNSHARDED
from topkast_func.facade.guard import watch
from topkast_func.facade.loading import POWERPROP, load
from topkast_func.facade.outsiders import say_who_reads
from topkast_func.facade.replaced import check_kept, check_stays
from topkast_func.facade.rule import Rule
from topkast_func.facade.sparse_weight import SparseWeight, weights_of
from topkast_func.facade.watched import release
from topkast_func.model.alone import KEPT
from topkast_func.types import Masks

Layer = TypeVar("Layer", bound="SparseLayer")


class _Running(threading.local):
    def __init__(self) -> None:  # in each thread: Dynamo guards what the instance itself holds
        self.depth = 0


_RUNNING = _Running()
"""How many forward passes of sparse layers, one within another, this thread is in."""


def _in_a_pass() -> bool:
    """Return whether this thread is in a forward pass of sparse layers, or in a backward pass."""
    if _RUNNING.depth or torch.compiler.is_compiling():
        return _RUNNING.depth > 0
    return torch._C._current_graph_task_id() != -1


class ForwardPass:
    """The time in which sparse weights read as α."""

    def __enter__(self) -> None:
        """Begin."""
        _RUNNING.depth += 1

    def __exit__(self, *_: object) -> None:
        """End."""
        _RUNNING.depth -= 1


def sparse_attribute(key: str) -> property:
    """Return the attribute of a sparse weight: α in a forward or backward pass, θ otherwise."""

    def read(layer: nn.Module) -> Any:
        if key not in layer._parameters:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute {key!r}")
        weights = weights_of(layer)
        if key in weights and _in_a_pass():
            return weights[key].alpha(layer)
        if key in weights:
            check_stays(key)
            say_who_reads(weights[key])
        return layer._parameters[key]

    def write(layer: nn.Module, value: object) -> None:
        raise AttributeError(
            f"{key!r} is sparse, and nothing but a parameter can take its place: what computes "
            "it, as pruning does, is to be applied before tk.sparsify or after tk.densify, and "
            "FullyShardedDataParallel after tk.densify alone"
        )

    return property(read, write)


def become(module: Any, kind: type) -> None:
    """Give a module another class; one that writes its attributes to a module within has its own.

    Args:
        module: The module.
        kind: The class.
    """
    object.__setattr__(module, "__class__", kind)


class SparseLayer(nn.Module):
    """Mixed into the class of a module, whose weights it lets be sparse."""

    _plain: ClassVar[Any]
    """The class of the module without sparse weights."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Call on, but for a class in place of another, which has been told of already.

        Args:
            **options: What is given to a class that is derived.

        Raises:
            TypeError: It is the class that fully_shard makes for a sparse module.
        """
        if any(base.__name__ == "FSDPModule" for base in cls.__bases__):
            raise TypeError(f"fully_shard of a sparse {cls._plain.__name__} is {UNSHARDED}")
        if "_plain" not in vars(cls):
            super().__init_subclass__(**options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Compute with α."""
        with ForwardPass():
            return super().forward(*inputs, **options)

    @property
    def parametrizations(self) -> nn.Module:
        """What parametrizes tensors of the module, but for who removes what the plain class had.

        `torch.nn.utils.parametrize.remove_parametrizations` writes to the tensor before it finds
        that the class is another.

        Raises:
            AttributeError: There is nothing.
            ValueError: It is to be removed.
        """
        found: nn.Module | None = self._modules.get("parametrizations")
        if found is None:
            raise AttributeError(f"{type(self).__name__!r} object has no 'parametrizations'")
        if not torch.compiler.is_compiling():
            check_kept(self._plain)
        return found

    @torch.no_grad()
    def _make_plain(self, done: set[int]) -> None:
        """Become a module of the plain class, whose weights are α, but for those that are so."""
        for weight in self._weights_left():
            if id(raw := weight.raw(self)) not in done:
                raw.copy_(torch.where(weight.masks(self).forward, weight.theta(self), 0.0))
                done.add(id(raw))
        self._leave()

    def _weights_left(self) -> list[SparseWeight]:
        """Return the sparse weights but for those set to None."""
        held = self._parameters
        return [w for key, w in weights_of(self).items() if held.get(key, w) is not None]

    def _leave(self) -> None:
        """Become a module of the plain class, whose parameters are as they are."""
        release(self)
        for weight in vars(self).pop(KEPT, {}).values():
            for hook in filter(None, (weight.hook, weight.asked)):
                hook.remove()
            self._buffers.pop(weight.buffer, None)
        become(self, self._plain)

    def extra_repr(self) -> str:
        """Describe the module, and how sparse its weights are."""
        told = [super().extra_repr()]
        for key, weight in weights_of(self).items():
            told.append(f"{key}_sparsity={tuple(round(s, 4) for s in weight.rule.allocation)}")
        return ", ".join(filter(None, told))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the layer from a pickle or a copy, maybe as the first sparse one of a process."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for weight in weights_of(self).values():
            watch(self)
            weight.look(self)
            weight.asked = kept_in_step(weight.probe, weight.raw(self))

    def _apply(self: Layer, fn: Callable[..., Any], recurse: bool = True) -> Layer:
        before = [(weight, weight.sets(self)) for weight in weights_of(self).values()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight, sets in before:
            weight.move(self, sets)
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse: torch.jit.script compiles neither α nor the kernels."""
        raise TypeError(
            f"torch.jit.script does not compile a sparse {self._plain.__name__}: torch.export and "
            "torch.jit.trace take it as it is, and torch.jit.script what tk.densify leaves"
        )

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Refuse: a copy for each pass has tensors of several devices for one set of caches."""
        raise TypeError(
            "torch.nn.DataParallel copies its module to several devices in every forward pass, "
            "which is not supported of one that is sparse: take DistributedDataParallel, with a "
            "process for each device, or DataParallel with one of device_ids; tk.densify makes it "
            "a plain one"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, *arguments: Any) -> None:
        for weight in weights_of(self).values():
            weight.derived(self)
            about = getattr(destination, "_metadata", {}).get(prefix[:-1], {})
            about.setdefault(POWERPROP, {})[weight.key] = weight.rule.config.powerprop
        super()._save_to_state_dict(destination, prefix, *arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load θ, or φ that is told to be one, and its sets; if missing, these are chosen."""
        load(self, super()._load_from_state_dict, *arguments)


def make_sparse(layer: nn.Module, key: str, rule: Rule, masks: Masks | None = None) -> None:
    """Let a parameter be sparse from now on.

    Args:
        layer: The layer, of a class that has a `sparse_attribute` of the name.
        key: Name of the parameter in the layer.
        rule: How its sets are chosen.
        masks: The sets to begin with; None to have them chosen.

    Raises:
        ValueError: The layer has something of the name of its sets, or writes to the weight in its
            forward pass.
    """
    weight = SparseWeight(key, rule)
    if hasattr(layer, weight.buffer):
        raise ValueError(
            f"{rule.name!r} cannot be sparse: its layer has a {weight.buffer!r} already, the name "
            "of the buffer that holds the sets; rename that, or keep the weight dense"
        )
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"{rule.name!r} cannot be sparse: with max_norm an embedding writes to its weight in "
            "its forward pass, which computes with α; make it with max_norm=None, or keep the "
            "weight dense"
        )
    vars(layer)[KEPT] = {**weights_of(layer), key: weight}
    weight.start(layer, masks)
    watch(layer)
