"""One sparse weight of a layer: θ in an ordinary parameter, and beside it the bits of A and B.

The bits are the truth. What kernels read is a cache, made anew where they have changed: by a
refresh, by `load_state_dict`, by a broadcast from another process.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from topkast_func.bits import packed
from topkast_func.facade.alpha import SETS, alpha, masks_in
from topkast_func.facade.dense_gradient import InStep, kept_in_step, moved
from topkast_func.facade.derived import Derived, bits_in, check_whole, derive
from topkast_func.facade.gathering import Gathering
from topkast_func.facade.rule import Rule
from topkast_func.facade.wrappers import note_wrapper
from topkast_func.masks import masks_at
from topkast_func.model.alone import KEPT
from topkast_func.model.indexed import AnySets
from topkast_func.powerprop import check_moves, phi_of, theta_of
from topkast_func.reading import readable
from topkast_func.types import Masks


class SparseWeight:
    """What a layer keeps for a sparse weight beside θ and the bits; a copy takes the rule along.

    Args:
        key: Name of the weight in its layer; its bits, uint8, [2, ⌈n/8⌉], are the buffer
            ``<key>`` + `SETS`.
        rule: How its sets are chosen.

    Attributes:
        probe: Zeros of the shape of θ, whose gradient is that of the loss at α with respect to
            every entry; None but in the step before a refresh that reads it.
        gathering: Reads θ on B.
        steps: Optimiser steps in which it had a gradient.
        overdue: Number of these at which whoever is to count them has clearly forgotten to.
        given: |A| and |B| when sets were last chosen; None where others are as good.
        hook: Tells a sparsifier of backward passes that reach it, as long as it is sparse.
        asked: Keeps the gradient of the probe in step with that of the parameter.
    """

    overdue = math.inf
    given: tuple[int, int] | None = None
    hook: RemovableHandle | None = None
    asked: InStep | None = None

    def __init__(self, key: str, rule: Rule) -> None:
        self.key, self.rule, self.steps = key, rule, 0
        self.probe: Tensor | None = None
        self._derived: Derived | None = None
        self.gathering = Gathering()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what is derived from the bits."""
        return SparseWeight, (self.key, self.rule), {"probe": self.probe, "steps": self.steps}

    @property
    def buffer(self) -> str:
        """Name of the buffer of the bits."""
        return f"{self.key}{SETS}"

    def raw(self, layer: nn.Module) -> nn.Parameter:
        """Return the parameter that is trained: θ, or φ of powerpropagation.

        Raises:
            RuntimeError: The layer has it no more.
        """
        found = layer._parameters.get(self.key)
        if found is None:
            raise RuntimeError(
                f"{self.rule.name!r} is no parameter of its layer any more: what replaces it, as "
                "weight_norm or pruning does, is to be applied before tk.sparsify, which then "
                "takes what it leaves, or after tk.densify"
            )
        return found

    def theta(self, layer: nn.Module) -> Tensor:
        """Return θ, with a gradient that reaches what is trained."""
        raw, exponent = self.raw(layer), self.rule.config.powerprop
        return raw if exponent == 1.0 else theta_of(raw, exponent)

    @torch.no_grad()
    def begin(self, layer: nn.Module, held: float = 1.0) -> None:
        """Turn the parameter from θ, or φ of an exponent ``held``, into what is trained.

        Raises:
            ValueError: Under powerpropagation it is 0 everywhere.
        """
        raw, exponent = self.raw(layer), self.rule.config.powerprop
        if exponent > 1.0:
            check_moves(self.rule.name, raw, exponent)
        if exponent != held:
            raw.copy_(phi_of(theta_of(raw, held), exponent))

    def sets(self, layer: nn.Module) -> Tensor:
        """Return the bits, a buffer of the layer.

        Raises:
            RuntimeError: They have been taken away.
            TypeError: θ is sharded.
            ValueError: θ has another shape than the weight that was made sparse.
        """
        check_whole(raw := self.raw(layer), self.rule.name)
        if (shape := raw.shape) != self.rule.shape:
            raise ValueError(
                f"{self.rule.name!r} has become of shape {tuple(shape)}, its sets are of shape "
                f"{self.rule.shape}: put a parameter of that shape back, or tk.densify the model "
                "before it is given others"
            )
        return bits_in(layer, self.buffer, self.rule.name)

    def masks(self, layer: nn.Module) -> Masks:
        """Return the sets; they are chosen if there are none yet."""
        return masks_in(self._bits(layer), self.raw(layer).shape)

    def indexed(self, layer: nn.Module) -> AnySets:
        """Return the sets as the kernels read them, where these compute the layer; else masks."""
        known = None if (derived := self.derived(layer)) is None else derived.indices()
        return self.masks(layer) if known is None else known

    def parts(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return θ on A and on B∖A, zero or absent elsewhere."""
        return self.gathering.parts(self.theta(layer), self.indexed(layer))

    def backward_bits(self, layer: nn.Module) -> Tensor:
        """Return B in bits; it is chosen if there is none yet."""
        return self._bits(layer)[1]

    def alpha(self, layer: nn.Module) -> Tensor:
        """Return α, with a gradient that reaches B."""
        found: Tensor = alpha(self.theta(layer), self._bits(layer))
        return found if self.probe is None else found + self.probe

    def start(self, layer: nn.Module, masks: Masks | None) -> None:
        """Begin with the masks, or with sets chosen from θ, which may be without data as yet."""
        raw = self.raw(layer)
        bits = raw.new_zeros((2, -(-raw.numel() // 8)), dtype=torch.uint8)
        layer.register_buffer(self.buffer, bits)
        if masks is not None:
            self.hold(layer, masks)
        elif readable(raw):
            self.choose(layer)
        else:
            self.look(layer)

    @torch.no_grad()
    def hold(self, layer: nn.Module, masks: Masks) -> None:
        """Take over new sets, in the buffer that is there, unless that is without data."""
        bits = torch.stack([packed(mask) for mask in masks])
        if self.sets(layer).is_meta:
            layer._buffers[self.buffer] = torch.empty_like(bits)
        self.sets(layer).copy_(bits)
        self.given = self.look(layer).counts

    @torch.no_grad()
    def choose(self, layer: nn.Module) -> None:
        """Choose the sets from θ alone, as training would start with them.

        Raises:
            NaNParameterError: θ holds NaN; nothing has changed.
        """
        rule, theta = self.rule, {self.rule.name: self.theta(layer)}
        allocations = {rule.name: rule.allocation}
        masks = masks_at(theta, allocations, rule.config, step=rule.step, seed=rule.seed)
        self.hold(layer, masks[rule.name])

    def derived(self, layer: nn.Module) -> Derived | None:
        """Return what is derived from the bits as they are now; sets are chosen if there are none.

        Args:
            layer: The layer.

        Returns:
            None where the bits are not the layer's own and cannot be read, as in `torch.func.vmap`.

        Raises:
            RuntimeError: The bits are no sets of this weight, and none follow from θ.
        """
        if torch.compiler.is_dynamo_compiling():
            self._catch_up(self.raw(layer).dtype)
        else:
            note_wrapper(self)
        sets, known = self.sets(layer), self._derived
        if known is None or known.sets is not sets:
            if torch.compiler.is_compiling() or not readable(sets):
                return None
            known = self.look(layer)
        elif not torch.compiler.is_compiling() and readable(sets) and known.outdated:
            known = self.look(layer)
        if known.counts is None and not sets.is_meta:
            self._mend(layer, known)
        return self._derived

    def _bits(self, layer: nn.Module) -> Tensor:
        derived = self.derived(layer)
        return self.sets(layer) if derived is None else derived.bits()

    def _catch_up(self, dtype: torch.dtype) -> None:
        """Look at bits that have been written to, while Dynamo traces what reads them."""
        note_wrapper(self)
        known = self._derived
        if known is not None and known.outdated:
            like = known.sets.new_empty((), dtype=dtype).expand(self.rule.shape)
            self._derived = derive(known.sets, like, self.rule, known)

    vars(_catch_up)["_dynamo_marked_constant"] = True  # torch.compiler's way loads Dynamo

    def look(self, layer: nn.Module) -> Derived:
        """Look at the bits, and make anew what depends on them."""
        self._derived = derive(self.sets(layer), self.raw(layer), self.rule, self._derived)
        return self._derived

    def move(self, layer: nn.Module, before: Tensor) -> None:
        """Follow θ to another device, where a layer was moved or cast, with the bits of before."""
        device = self.sets(layer).device
        lost = before.is_meta and device.type != "meta"
        bits = torch.zeros_like(before, device=device) if lost else before.to(device)
        layer._buffers[self.buffer] = bits
        self._derived, self.probe = None, moved(self.probe, self.raw(layer))
        self.asked = kept_in_step(self.probe, self.raw(layer), self.asked)
        self.look(layer)

    def _mend(self, layer: nn.Module, known: Derived) -> None:
        """Choose sets where there are none yet."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"the sets of {self.rule.name!r} are not chosen yet: load a state dict, or run "
                "the model once before it is compiled"
            )
        if known.content.any():
            raise RuntimeError(
                f"{self.buffer!r} of {self.rule.name!r} has been overwritten by what are no sets "
                "of it, as a running mean of buffers is: build AveragedModel with "
                "use_buffers=False, or copy that buffer from the trained model, or zero it to "
                "have sets chosen from the weight"
            )
        self.choose(layer)


def weights_of(module: nn.Module) -> Mapping[str, SparseWeight]:
    """Return what a module keeps for its sparse weights, by their names in it."""
    found: Mapping[str, SparseWeight] = vars(module).get(KEPT, {})
    return found
