"""What is derived from the bits of the sets: whether they are whole, and what the kernels read."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from topkast_func.block_masks import is_of_blocks
from topkast_func.config import TopKastConfig
from topkast_func.facade.alpha import masks_in
from topkast_func.facade.rule import Rule
from topkast_func.kernels.agreed import agreed, in_a_graph
from topkast_func.kernels.pattern import pattern_of, places_in
from topkast_func.masks import telling
from topkast_func.model.indexed import Indexed
from topkast_func.places import counted
from topkast_func.reading import readable, version
from topkast_func.types import Masks, changed

UNSHARDED = (
    'not supported: tk.make_train_step(process_group=…, shard="owners") shares a sparse model '
    "among processes, DistributedDataParallel takes one whole, and tk.densify, before it is "
    "sharded, makes it a plain one"
)


class Derived(NamedTuple):
    """Facts found in the bits, and indices made of them.

    Attributes:
        sets: The buffer of the bits.
        version: How often it had been written to; None where that is not counted.
        content: A copy of what it held.
        counts: |A| and |B|; None where it held no sets of a size that the rule knows.
        indexed: The sets for the kernels, where these compute the layer.
    """

    sets: Tensor
    version: int | None
    content: Tensor
    counts: tuple[int, int] | None
    indexed: Indexed | None = None

    @property
    def outdated(self) -> bool:
        """Whether the buffer has been written to; on the host, through ``.data`` too."""
        if self.sets.device.type == "cpu":
            return not same(self.content, self.sets)
        return self.version is None or self.version != version(self.sets)

    def bits(self) -> Tensor:
        """Return the bits; in a graph, which would go on with any, no others than sets."""
        if not in_a_graph():
            return self.sets
        return self.sets + agreed(self.sets, self.content, exact=False)

    def indices(self) -> Indexed | None:
        """Return the index; in a graph, which keeps it, for no other bits than it was made of."""
        if self.indexed is None or not in_a_graph():
            return self.indexed
        same = agreed(self.sets, self.content, exact=True)
        return changed(self.indexed, places=self.indexed.places + same)


@torch.inference_mode(False)
def derive(sets: Tensor, theta: Tensor, rule: Rule, known: Derived | None) -> Derived:
    """Look at bits, and make what depends on them, unless that is known.

    Args:
        sets: The bits.
        theta: θ.
        rule: How its sets are chosen.
        known: What was derived last.

    Returns:
        What is derived from these bits.
    """
    if not readable(sets):
        return Derived(sets, None, sets, None)
    if known is not None and same(known.content, sets):
        return changed(known, sets=sets, version=version(sets))
    masks = masks_in(sets, theta.shape)
    counts = counts_of(masks, rule.config)
    counts = counts if counts in rule.counts else None
    indexed = None
    if counts is not None and rule.choice(theta, *counts).engine != "dense":
        block = rule.config.block_shape
        pattern = pattern_of(*masks, block, sizes=counts)
        indexed = Indexed(pattern, theta.shape, places_in(pattern, block, theta.shape))
    return Derived(sets, version(sets), sets.clone(), counts, indexed)


def counts_of(masks: Masks, config: TopKastConfig) -> tuple[int, int] | None:
    """Return |A| and |B|; None where A is not within B, or these are not of blocks or groups."""
    forward, backward, both, *uneven = counted(telling(*masks, config.group))
    whole = all(is_of_blocks(mask, config.block_shape) for mask in masks)
    return (forward, backward) if both == forward and not any(uneven) and whole else None


def check_whole(theta: Tensor, name: str) -> None:
    """Check that a weight is not sharded.

    Args:
        theta: θ.
        name: Its name.

    Raises:
        TypeError: It is.
    """
    if not torch.compiler.is_compiling() and hasattr(theta, "device_mesh"):
        raise TypeError(
            f"{name!r} is sparse and has been sharded, as fully_shard does, which is {UNSHARDED}"
        )


def bits_in(layer: nn.Module, buffer: str, name: str) -> Tensor:
    """Return the bits of a weight, a buffer of its layer.

    Args:
        layer: The layer.
        buffer: Name of the buffer.
        name: Name of the weight.

    Returns:
        The bits.

    Raises:
        RuntimeError: The layer has them no more.
    """
    if (found := layer._buffers.get(buffer)) is None:
        raise RuntimeError(
            f"{name!r} has no sets any more, which are the buffer {buffer!r} of its layer: they "
            "were deleted, or a shallow copy of the layer, which shares them, was densified; "
            "make copies by copy.deepcopy, and sparsify a plain model again"
        )
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors can be read, on one device, and are equal."""
    if a.dtype == b.dtype == torch.complex32:  # which torch compares in parts alone
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return a.device == b.device and readable(a) and torch.equal(a, b)
