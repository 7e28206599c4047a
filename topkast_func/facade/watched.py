"""Which layers have sparse weights, as long as they live, whoever made them."""

from weakref import WeakValueDictionary

from torch import Tensor, nn

from topkast_func.facade.sparse_weight import SparseWeight, weights_of
from topkast_func.powerprop import phi_is_told_by

_LAYERS: "WeakValueDictionary[int, nn.Module]" = WeakValueDictionary()

_enlisted = 0


def enlist(layer: nn.Module) -> None:
    """Take a layer in.

    It is asked for its parameters at each step, so that others may take their place.
    """
    global _enlisted
    _enlisted += 1
    _LAYERS[id(layer)] = layer


def enlisted() -> int:
    """Return how often a layer has been taken in so far."""
    return _enlisted


def release(layer: nn.Module) -> None:
    """Let a layer go."""
    _LAYERS.pop(id(layer), None)


def watched() -> dict[int, tuple[nn.Module, SparseWeight]]:
    """Return the layers that are watched, and their sparse weights, by the id of the parameter."""
    return {id(weight.raw(layer)): (layer, weight) for layer, weight in all_watched()}


def all_watched() -> list[tuple[nn.Module, SparseWeight]]:
    """Return each layer that is watched with each sparse weight that it has, tied ones too."""
    layers = [layer for ref in _LAYERS.valuerefs() if (layer := ref()) is not None]
    return [
        (layer, weight)
        for layer in layers
        for key, weight in weights_of(layer).items()
        if layer._parameters.get(key) is not None
    ]


@phi_is_told_by
def _phi() -> list[Tensor]:
    """Return the parameters that hold φ, of layers that are watched."""
    return [w.raw(layer) for layer, w in all_watched() if w.rule.config.powerprop > 1.0]
