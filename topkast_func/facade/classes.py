"""Classes of layers with sparse weights, made of those without."""

from copyreg import __newobj__  # type: ignore[attr-defined]
from functools import cache, wraps
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from topkast_func.facade.derived import check_whole
from topkast_func.facade.sparse_attention import SparseAttention
from topkast_func.facade.sparse_convolution import SparseConvolution
from topkast_func.facade.sparse_layer import SparseLayer, become, sparse_attribute
from topkast_func.facade.sparse_linear import SparseLinear
from topkast_func.facade.sparse_weight import weights_of
from topkast_func.model.attention import AttentionStandIn
from topkast_func.model.convolution import ConvolutionStandIn
from topkast_func.model.stand_in import StandIn, TransposedStandIn

MIXED: dict[type[StandIn], Any] = {
    AttentionStandIn: SparseAttention,
    ConvolutionStandIn: SparseConvolution,
    StandIn: SparseLinear,
    TransposedStandIn: SparseLinear,
}
"""What computes in modules of the classes that a stand-in knows."""

QUANTIZED = (
    "torch.ao.quantization knows no sparse {} and would leave it as it is: quantize a copy that "
    "is plain, tk.densify(copy.deepcopy(model))"
)
"""What whoever quantizes is told, who first gives each module a ``qconfig``."""


@cache
def sparse_class(plain: Any, keys: tuple[str, ...]) -> type[SparseLayer]:
    """Return the subclass of a class whose modules have sparse weights.

    Args:
        plain: The class; the new one goes by its name.
        keys: Names of the sparse weights; none for a module that has such layers within it.

    Returns:
        The class, always the same for the same arguments.
    """
    mixed = _mixed_into(plain)

    @wraps(plain.__init__)
    def init(self: Any, *inputs: Any, **options: Any) -> None:
        if type(self) is made:
            become(self, plain)  # of a new module no weight is sparse
        plain.__init__(self, *inputs, **options)

    @wraps(plain.forward)
    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        runs = mixed if isinstance(self, mixed) else plain  # bound before the module was densified
        return runs.forward(self, *inputs, **options)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        make, _, *state = plain.__reduce_ex__(self, protocol)
        if make is not __newobj__:
            raise TypeError(f"{plain.__name__} copies itself in its own way: densify it first")
        return _blank, (plain, keys), *state

    def assign(self: Any, name: str, value: Any) -> None:
        if name == "qconfig" and weights_of(self):
            raise TypeError(QUANTIZED.format(plain.__name__))
        if name in keys and name in weights_of(self):
            check_whole(value, weights_of(self)[name].rule.name)
        plain.__setattr__(self, name, value)

    members: dict[str, Any] = {key: sparse_attribute(key) for key in keys}
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_plain": plain}
    transposed = TransposedStandIn.is_of(plain)
    own = {"__init__": init, "forward": forward, "__reduce_ex__": reduce}
    members |= {**named, **own, "_transposed": transposed}
    if keys:  # a part that has none may be changed in its forward pass, as Dynamo follows
        members["__setattr__"] = assign
    made = type(plain.__name__, (mixed, plain), members)
    return made


def check_replaceable(path: str, layer: SparseLayer) -> None:
    """Check that a layer has its weights, and its plain class what torch has put into classes.

    Args:
        path: Where the layer is in its model.
        layer: The layer.

    Raises:
        ValueError: torch has put a parametrization into its sparse class.
    """
    for weight in layer._weights_left():
        weight.raw(layer)
    found: Any = layer.parametrizations if is_parametrized(layer) else ()
    if not vars(layer._plain).keys() >= set(found):
        raise ValueError(
            f"{path or 'model'!r} got a parametrization after tk.sparsify: remove it first, by "
            "torch.nn.utils.parametrize.remove_parametrizations, and register it again later"
        )


def _mixed_into(plain: Any) -> Any:
    """Return what computes with α in modules of a class, on the kernels where they can."""
    return next((mixed for part, mixed in MIXED.items() if part.is_of(plain)), SparseLayer)


def _blank(plain: Any, keys: tuple[str, ...]) -> nn.Module:
    """Make a module to be filled from a pickle."""
    made: Any = sparse_class(plain, keys)
    blank: nn.Module = made.__new__(made)
    return blank
