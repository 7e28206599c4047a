"""Who writes to θ outside B beside the optimiser that has it: flat buffers, and wrappers."""

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topkast_func.facade.keeping import keep_within
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.reading import dispatches, readable
from topkast_func.warn import warn_caller

WINDOW = 1 << 14
"""Entries that are looked at after a step."""

EVERY = 4
"""One of how many steps is looked at."""

_BEFORE: "WeakKeyDictionary[SparseWeight, ref[Tensor]]" = WeakKeyDictionary()
"""Copies of θ before the last step of an optimiser, whose owner keeps them."""


def check_apart_from_others(
    optimizer: Optimizer, sparse: Mapping[int, tuple[nn.Module, SparseWeight]]
) -> None:
    """Check that an optimiser has no tensor that shares memory with a sparse weight but is none.

    Args:
        optimizer: The optimiser.
        sparse: The sparse weights by the id of the parameter.

    Raises:
        ValueError: It has one.
    """
    of_storage: dict[int, list[tuple[Tensor, SparseWeight]]] = {}
    for layer, weight in sparse.values():
        if (raw := weight.raw(layer)).numel() and readable(raw):
            of_storage.setdefault(_storage(raw), []).append((raw, weight))
    others = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in sparse]
    for other in others:
        if not readable(other) or other.layout != torch.strided or not other.numel():
            continue
        several = of_storage.get(_storage(other), ())
        if names := [weight.rule.name for raw, weight in several if _overlap(raw, other)]:
            raise ValueError(
                f"the optimizer has a tensor of shape {tuple(other.shape)} of which {names} are "
                "views, or which is a view of them, so that its step would move what lies outside "
                "B: build the optimizer from model.parameters(), or, with a flat buffer, "
                "make_train_step from the plain model"
            )


def note(weight: SparseWeight, before: Tensor) -> None:
    """Take note of what a weight was before the step of its optimiser that has just been made."""
    _BEFORE[weight] = ref(before)


def forget(weights: Iterable[tuple[nn.Module, SparseWeight]]) -> None:
    """Forget what weights were, whose sets or numbers are others now for a good reason."""
    for _, weight in weights:
        _BEFORE.pop(weight, None)


def say_who_writes(weights: Iterable[tuple[nn.Module, SparseWeight]], turn: int) -> None:
    """Warn if a part of a weight is another outside B than its optimiser has left it.

    One step of a few is looked at, by no rule that a wrapper would have, too.

    Args:
        weights: Sparse weights that have been moved since the last call, of which one is looked at.
        turn: A number that is another in each call, by which it is chosen, and which part.
    """
    chance, asked = divmod(_scattered(turn), EVERY)
    known = [(layer, weight) for layer, weight in weights if weight in _BEFORE]
    if asked or not known:
        return
    turns, which = divmod(chance, len(known))
    layer, weight = known[which]
    before = _BEFORE.pop(weight)()
    if before is not None and _written_to(layer, weight, before, turns):
        warn_caller(
            f"something has written to {weight.rule.name!r} outside B after the step of its "
            "optimizer, as wrappers do that are no torch.optim.Optimizer and take slow weights "
            "over, or average them: what lies outside B is then not what it was, and the sets are "
            "chosen by it. Derive the wrapper from torch.optim.Optimizer, whose step puts that "
            "back; if you constrain the weights by hand, nothing is amiss"
        )


def _scattered(number: int) -> int:
    """Return a number of 32 bits that follows from another in no way that is seen (Murmur)."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        number = (number ^ number >> 16) * factor & 0xFFFFFFFF
    return number ^ number >> 16


def _written_to(layer: nn.Module, weight: SparseWeight, before: Tensor, turn: int) -> bool:
    theta = weight.raw(layer).detach()
    kinds = [(t.shape, t.dtype, t.device, t.is_contiguous()) for t in (theta, before)]
    if kinds[0] != kinds[1] or not kinds[0][3] or dispatches(theta):
        return False
    first = WINDOW * (turn % -(-theta.numel() // WINDOW))
    now, then = (t.view(-1)[first : first + WINDOW] for t in (theta, before))
    kept, bits = now.clone(), weight.backward_bits(layer)[first // 8 :]
    keep_within(bits[: -(-len(now) // 8)], kept, then)
    return not torch.equal(kept.view(torch.uint8), now.view(torch.uint8))  # NaN are equal, too


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one storage have an entry of it in common."""
    (first, last, dense), (begin, end, other_dense) = _stretch(a), _stretch(b)
    if last < begin or end < first or (dense and other_dense):
        return first <= end and begin <= last
    return bool(torch.isin(_places(a), _places(b)).any())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _stretch(tensor: Tensor) -> tuple[int, int, bool]:
    """Return where the bytes of a tensor begin and end, and whether all between are its own."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin, size = tensor.data_ptr(), tensor.element_size()
    return begin, begin + reach * size + size - 1, reach + 1 == tensor.numel()


def _places(tensor: Tensor) -> Tensor:
    """Return where the bytes of a tensor are."""
    places = torch.arange(tensor.element_size(), device="cpu") + tensor.data_ptr()
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(n, device="cpu") * step * tensor.element_size()
    return places.flatten()
