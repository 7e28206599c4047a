"""One sparse weight of a layer: θ in an ordinary parameter, and beside it the bits of A and B.

The bits are the truth. What is derived from them for the kernels is a cache, made anew
wherever they have changed: by a refresh, by `load_state_dict`, by a broadcast to other processes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from topkast_func.bits import packed, unpacked
from topkast_func.config import TopKastConfig
from topkast_func.facade.alpha import alpha
from topkast_func.kernels.engines import Choice, EngineName, Layer, choose
from topkast_func.kernels.pattern import Pattern, pattern_of
from topkast_func.masks import masks_at
from topkast_func.methods.magnitude import Magnitude
from topkast_func.sparsity import Allocation
from topkast_func.types import Masks

BATCH = 256
"""Rows of activations for which it is decided whether kernels compute a layer."""


class Rule(NamedTuple):
    """How the sets of a weight are chosen.

    Attributes:
        name: Name of the weight in the model.
        config: The configuration; which parameters it selects is not read.
        allocation: The sparsities in force.
        counts: |A| and |B| of every stage of the configuration.
        step: Number of the step that comes next.
        seed: Seed of the methods that draw.
        engine: Who computes the products, where kernels can.
    """

    name: str
    config: TopKastConfig
    allocation: Allocation
    counts: frozenset[tuple[int, int]]
    step: int = 0
    seed: int = 0
    engine: EngineName = "auto"


class Indexed(NamedTuple):
    """Sets for the kernels.

    Attributes:
        pattern: The sets.
        places: Where the values of the pattern stand in the flat θ, int64, in their shape.
    """

    pattern: Pattern
    places: Tensor

    def values(self, theta: Tensor) -> Tensor:
        """Gather the values of B from θ, A first."""
        return theta.flatten().gather(0, self.places.flatten()).view(self.places.shape)


class Derived(NamedTuple):
    """What was found in the bits, or made of them.

    Attributes:
        sets: The buffer of the bits.
        version: How often it had been written to; None where that is not counted.
        content: A copy of what it held; on the host it is compared with, at every look.
        whole: Whether it held sets of a size that the rule knows.
        index: The sets for the kernels, where these compute the layer.
    """

    sets: Tensor
    version: int | None
    content: Tensor
    whole: bool
    index: Indexed | None = None


class SparseWeight:
    """What a layer keeps for a sparse weight beside θ and the bits; a copy takes the rule along.

    Args:
        key: Name of the weight in its layer; its bits, uint8, [2, ⌈n/8⌉], are the buffer
            ``<key>_sets``.
        rule: How its sets are chosen.
        matrix: Whether it is the weight of a linear layer, which kernels can compute.

    Attributes:
        probe: Zeros of the shape of θ, whose gradient is that of the loss at α with respect to
            every entry; None but in the step before a refresh that reads it.
        steps: Steps of optimisers that had a gradient of it.
    """

    def __init__(self, key: str, rule: Rule, matrix: bool = False) -> None:
        self.key, self.rule, self.matrix = key, rule, matrix
        self.probe: Tensor | None = None
        self.steps = 0
        self._derived: Derived | None = None

    def __reduce__(self) -> tuple[type["SparseWeight"], tuple[str, Rule, bool]]:
        """Leave behind what is derived."""
        return SparseWeight, (self.key, self.rule, self.matrix)

    @property
    def buffer(self) -> str:
        """Name of the buffer of the bits."""
        return f"{self.key}_sets"

    def theta(self, layer: nn.Module) -> nn.Parameter:
        """Return θ."""
        return layer._parameters[self.key]  # type: ignore[return-value]

    def sets(self, layer: nn.Module) -> Tensor:
        """Return the bits."""
        return layer._buffers[self.buffer]  # type: ignore[return-value]

    def masks(self, layer: nn.Module) -> Masks:
        """Return the sets; they are chosen if there are none yet."""
        self.derived(layer)
        return _masks(self.sets(layer), self.theta(layer).shape)

    def alpha(self, layer: nn.Module) -> Tensor:
        """Return α, with a gradient that reaches B."""
        self.derived(layer)
        found = alpha(self.theta(layer), self.sets(layer))
        return found if self.probe is None else found + self.probe

    def start(self, layer: nn.Module, masks: Masks | None = None) -> None:
        """Begin with the masks, or with sets chosen from θ, which may be without data as yet."""
        theta = self.theta(layer)
        bits = theta.new_zeros((2, -(-theta.numel() // 8)), dtype=torch.uint8)
        layer.register_buffer(self.buffer, bits)
        if masks is not None:
            self.hold(layer, masks)
        elif readable(theta):
            self.choose(layer)
        else:
            self.look(layer)

    @torch.no_grad()
    def hold(self, layer: nn.Module, masks: Masks) -> None:
        """Take over new sets, in the buffer that is there."""
        self.sets(layer).copy_(torch.stack([packed(mask) for mask in masks]))
        self.look(layer)

    def choose(self, layer: nn.Module) -> None:
        """Choose the sets from θ alone, as training would start with them.

        Args:
            layer: The layer.

        Raises:
            NaNParameterError: θ holds NaN; nothing has changed.
        """
        name, config, allocation, _, step, seed, _ = self.rule
        params, allocations = {name: self.theta(layer)}, {name: allocation}
        self.hold(layer, masks_at(params, allocations, config, step=step, seed=seed)[name])

    def derived(self, layer: nn.Module) -> Derived | None:
        """Return what is derived from the bits as they are now; sets are chosen if there are none.

        Args:
            layer: The layer.

        Returns:
            None where the bits are not the layer's own and cannot be read, as in `torch.func.vmap`.

        Raises:
            RuntimeError: The bits are no sets of this weight, and none follow from θ.
        """
        sets, known = self.sets(layer), self._derived
        if known is None or known.sets is not sets:
            if torch.compiler.is_compiling() or not readable(sets):
                return None
            known = self.look(layer)
        elif not torch.compiler.is_compiling() and _changed(known):
            known = self.look(layer)
        if not known.whole and not sets.is_meta:
            self._mend(layer, known)
        return self._derived

    def look(self, layer: nn.Module) -> Derived:
        """Look at the bits, and make anew what depends on them."""
        sets, known = self.sets(layer), self._derived
        if not readable(sets):
            found = Derived(sets, None, sets, whole=False)
        elif known is not None and _equal(known.content, sets):
            found = known._replace(sets=sets, version=_version(sets))
        else:
            masks = _masks(sets, self.theta(layer).shape)
            whole = counts_of(masks) in self.rule.counts
            index = self._index(masks, self.theta(layer)) if whole else None
            found = Derived(sets, _version(sets), sets.clone(), whole, index)
        self._derived = found
        return found

    def moved(self, layer: nn.Module, before: Tensor) -> None:
        """Follow θ to another device, and let nothing else happen to the bits.

        Args:
            layer: The layer, of which all tensors have been moved or cast.
            before: The bits as they were.
        """
        device = self.sets(layer).device
        lost = before.is_meta and device.type != "meta"
        bits = torch.zeros_like(before, device=device) if lost else before.to(device)
        layer._buffers[self.buffer] = bits
        if self.probe is not None:
            self.probe = torch.zeros_like(self.theta(layer)).requires_grad_()
        self._derived = None
        self.look(layer)

    def misfit(self, layer: nn.Module, bits: object, name: str) -> str | None:
        """Say why bits from a checkpoint are no sets of this weight, if they are not.

        Args:
            layer: The layer.
            bits: What the checkpoint has; torch itself complains of another shape.
            name: Name of the bits there.

        Returns:
            The reason.
        """
        if not isinstance(bits, Tensor) or not readable(bits):
            return None
        if bits.shape != self.sets(layer).shape:
            return None
        if bits.dtype != torch.uint8:
            return f"{name} must be torch.uint8, got {bits.dtype}"
        counts = counts_of(_masks(bits, self.theta(layer).shape))
        if counts in self.rule.counts:
            return None
        known = " or ".join(map(str, sorted(self.rule.counts)))
        return (
            f"{name} has |A|, |B| = {counts or 'A outside B'}, this layer {known}: the checkpoint is "
            "of another sparsity; without that key the sets are chosen from its weight"
        )

    def _mend(self, layer: nn.Module, known: Derived) -> None:
        """Choose sets where there are none, or where a mean of bits has replaced them."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"the sets of {self.rule.name!r} are not chosen yet: load a state dict, or run "
                "the model once before it is compiled"
            )
        if known.content.any() and not isinstance(self.rule.config.method, Magnitude):
            raise RuntimeError(
                f"{self.buffer!r} of {self.rule.name!r} has been overwritten, and the method does "
                "not choose by θ alone: copy that buffer from the trained model"
            )
        self.choose(layer)

    def choice(self, layer: nn.Module) -> Choice:
        """Return who computes with the weight, and why."""
        return self._choice(self.masks(layer), self.theta(layer))

    def _choice(self, masks: Masks, theta: Tensor) -> Choice:
        counts = counts_of(masks)
        if not self.matrix or counts is None:
            return Choice("dense", ALPHA)
        rows, columns = theta.shape
        dtype, device, block = theta.dtype, theta.device.type, self.rule.config.block_shape
        layer = Layer(rows, columns, *counts, block, BATCH, dtype, device)
        return choose(self.rule.engine, layer)

    def _index(self, masks: Masks, theta: Tensor) -> Indexed | None:
        """Index the sets, unless the weight is computed with densely."""
        if self._choice(masks, theta).engine == "dense":
            return None
        block = self.rule.config.block_shape
        pattern = pattern_of(*masks, block)
        return Indexed(pattern, pattern.flat_index(block, theta.shape))


ALPHA = "with all of α: not the weight of a plain nn.Linear"


def weights_of(module: nn.Module) -> Mapping[str, SparseWeight]:
    """Return what a module keeps for its sparse weights, by their names in it."""
    found: Mapping[str, SparseWeight] = vars(module).get(KEPT, {})
    return found


KEPT = "_sparse_weights"
"""Attribute of a layer that holds what `weights_of` returns."""


def counts_of(masks: Masks) -> tuple[int, int] | None:
    """Return |A| and |B|; None where A is no part of B."""
    forward, backward = masks
    nested = not (forward & ~backward).any()
    return (int(forward.sum()), int(backward.sum())) if nested else None


def readable(tensor: Tensor) -> bool:
    """Return whether Python can look at the numbers of a tensor."""
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _masks(sets: Tensor, shape: torch.Size) -> Masks:
    return Masks(unpacked(sets[0], shape), unpacked(sets[1], shape))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _changed(known: Derived) -> bool:
    """Return whether a buffer has been written to, or on a device may have been."""
    if known.sets.device.type == "cpu":
        return not _equal(known.content, known.sets)
    return known.version is None or known.version != _version(known.sets)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and readable(a) and torch.equal(a, b)
