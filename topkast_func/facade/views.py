"""Parameters of an optimiser that share memory with sparse weights: flat buffers of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.reading import readable


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


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one storage have an entry of it in common."""
    (first, last, dense), (begin, end, other_dense) = _stretch(a), _stretch(b)
    if last < begin or end < first or (dense and other_dense):
        return first <= end and begin <= last
    return bool(torch.isin(_places(a), _places(b)).any())


def _storage(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata  # what has no memory, as on meta, has one too
    return place


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
