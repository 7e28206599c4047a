"""Sparse layers made plain again, with α for weights."""

from typing import TypeVar

from torch import nn

from topkast_func.checks import check_type
from topkast_func.facade.classes import check_replaceable
from topkast_func.facade.owners import check_apart
from topkast_func.facade.sparse_layer import SparseLayer

Module = TypeVar("Module", bound=nn.Module)


def densify(model: Module) -> Module:
    """Turn sparse layers back into plain ones that hold α, in place.

    What `torch.compile` made of a module that was sparse by then is to be compiled anew: torch
    passes over the forward pass of a class of `torch.nn` that it has not met there.

    Args:
        model: A module that `sparsify` made sparse, or that has layers such as `TopKastLinear`.

    Returns:
        The same module.

    Raises:
        TypeError: It is no module.
        ValueError: It has no sparse weights any more, a layer got a parametrization after it was
            made sparse, or a weight under powerpropagation is tied to one of a sparse layer
            outside; nothing has changed.

    Example:
        >>> from topkast_func import TopKastConfig, sparsify
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> sparsifier = sparsify(model, TopKastConfig(0.5, 0.25, keep_dense="2.*"))
        >>> type(densify(model)[0]), int((model[0].weight != 0).sum())
        (<class 'torch.nn.modules.linear.Linear'>, 32)
    """
    check_type("model", model, nn.Module)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, SparseLayer)}
    if not layers:
        raise ValueError(
            "model has no sparse weights: sparsify was never called on it, or it is plain again, "
            "as a TopKastCallback leaves it after training (densify_at_end=False keeps it sparse)"
        )
    for path, layer in layers.items():
        check_replaceable(path, layer)
    check_apart(model)
    done: set[int] = set()
    for layer in layers.values():
        layer._make_plain(done)
    return model
