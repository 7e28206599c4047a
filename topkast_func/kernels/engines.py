"""Engines: who computes the products of a layer, and which of them is the fastest."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from topkast_func.kernels.costs import Layer, cost
from topkast_func.kernels.tiles import pack, unpack

EngineName: TypeAlias = Literal["auto", "numba", "triton", "dense", "reference", "torch_sparse"]

ENGINES: tuple[EngineName, ...] = ("numba", "triton", "dense", "reference", "torch_sparse")
"""Every engine, the ones that auto chooses among first; "numba" are the kernels of the CPU, named
after what they were first written in."""


class Engine(NamedTuple):
    """The products of a sparse layer, on activations in the layout of the engine.

    Attributes:
        forward: ``forward(values, x, pattern, out_features)``: W_A·x.
        input_gradient: ``input_gradient(values, g, pattern, in_features)``: W_Aᵀ·g.
        weight_gradient: ``weight_gradient(g, x, pattern, values)``: g·xᵀ sampled on B, in the
            order and shape of ``values``.
    """

    forward: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]


class Layout(NamedTuple):
    """How an engine takes its activations.

    Attributes:
        pack: ``pack(x, turn)``: activations [batch, features] to the layout, whose second axis
            are the features; how tiles are transposed need not be said.
        unpack: ``unpack(y, batch, turn)``: back.
    """

    pack: Callable[..., Tensor]
    unpack: Callable[..., Tensor]


ALPHA = "all of α: "
"""How the reason begins where no kernel can compute a weight."""


class Choice(NamedTuple):
    """An engine and why it was chosen.

    Attributes:
        engine: Its name.
        reason: One line.
    """

    engine: str
    reason: str


_FLOATS = (torch.float32, torch.float64)
_RUNS: dict[str, tuple[tuple[torch.dtype, ...], tuple[str, ...]]] = {
    "numba": ((*_FLOATS, torch.bfloat16), ("cpu",)),
    "triton": ((torch.float32, torch.float16, torch.bfloat16), ("cuda",)),
    "torch_sparse": (_FLOATS, ("cpu", "cuda")),
}
_KERNELS = {"cpu": "numba", "cuda": "triton"}
"""The engine beside "dense" that auto chooses, by the type of the device."""

TRITON_SIDE = 16
"""What divides the sides of the blocks that Triton computes: the least tile of a tensor core."""

WITH_CORES = (8, 0)
"""Compute capability from which on Triton multiplies on tensor cores; "auto" asks for it."""

_INSTALL = {
    "numba": "pip install llvmlite",
    "triton": "pip install 'topkast_func[triton]'",
    "torch_sparse": "install torch first, then "
    "pip install --no-build-isolation 'topkast_func[torch-sparse]'",
}


@cache
def engine(name: str) -> Engine:
    """Return an engine.

    Args:
        name: One of `ENGINES`, or "shifted_cpu" for the convolutions of "numba".

    Returns:
        Its functions.

    Raises:
        ImportError: It needs a package that is not installed; the text says how to get it.
    """
    modules = {"numba": "numba_cpu", "triton": "triton_gpu"}
    try:
        module = import_module(f"topkast_func.kernels.{modules.get(name, name)}")
    except ImportError as reason:
        raise ImportError(
            f"engine {name!r} cannot be used ({reason}): {_INSTALL[name]}"
        ) from reason
    return Engine(module.forward, module.input_gradient, module.weight_gradient)


def layout(name: str) -> Layout:
    """Return how an engine takes its activations.

    Args:
        name: One of `ENGINES`.

    Returns:
        Tiles for "numba"; [batch, features] for the others.
    """
    return Layout(pack, unpack) if name == "numba" else Layout(_same, _same)


def choose(name: EngineName, layer: Layer) -> Choice:
    """Choose the engine of a layer.

    Args:
        name: An engine, or "auto" for the one of least `cost` that is installed and supports
            the layer.
        layer: The layer.

    Returns:
        The choice.

    Raises:
        ImportError: An engine asked for by name is not installed.
        TypeError: An engine asked for by name does not support the dtype, device or block.
        ValueError: There is no engine of that name.
    """
    check_engine(name)
    if layer.rows and name not in ("auto", "numba"):
        return Choice("dense", "convolutions are those of 'numba' or dense")
    if name != "auto":
        engine(name)
        if problem := _problem(name, layer):
            raise TypeError(f"engine {problem}")
        return Choice(name, "asked for")
    kernels = _KERNELS.get(layer.device, "numba")
    if problem := _problem(kernels, layer, WITH_CORES):
        return Choice("dense", ALPHA + problem)
    if not installed(kernels):
        return Choice("dense", f"{ALPHA}{kernels} is not installed ({_INSTALL[kernels]})")
    costs = {name: cost(name, layer) for name in (kernels, "dense")}
    best = min(costs, key=lambda name: costs[name])
    told = ", ".join(f"{name} {1e-6 * c:.3g} ms" for name, c in costs.items())
    return Choice(best, told if layer.device == "cpu" else f"{told}, projected, not measured")


def check_engine(name: str) -> None:
    """Check that there is an engine of this name, or that it is "auto".

    Args:
        name: The name.

    Raises:
        ValueError: There is none.
    """
    if name not in ("auto", *ENGINES):
        raise ValueError(f"engine must be 'auto' or one of {ENGINES}, got {name!r}")


@cache
def installed(name: str) -> bool:
    """Return whether an engine and the package it needs are there."""
    try:
        engine(name)
    except ImportError:
        return False
    return True


def _problem(name: str, layer: Layer, least: tuple[int, int] = (7, 0)) -> str | None:
    """Say why an engine cannot compute a layer, if it cannot, or not on a GPU so old."""
    if layer.rows and name == "triton":
        return "triton computes no convolutions"
    dtypes, devices = _RUNS.get(name, ((), ()))
    if dtypes and layer.dtype not in dtypes:
        given, *supported = (str(d).removeprefix("torch.") for d in (layer.dtype, *dtypes))
        return f"{name} takes {', '.join(supported)}, not {given}"
    if devices and layer.device not in devices:
        return f"{name} runs on {' and '.join(devices)}, not on {layer.device}"
    if name == "triton" and any(side % TRITON_SIDE for side in layer.block_shape):
        return (
            f"triton computes blocks whose sides are multiples of {TRITON_SIDE}, not "
            f"{layer.block_shape}: choose such blocks by block_shape, or engine='dense'"
        )
    return _too_old(layer, least) if name == "triton" and layer.device == "cuda" else None


def _too_old(layer: Layer, least: tuple[int, int]) -> str | None:
    """Say why the GPU cannot compute a layer in Triton, if it cannot."""
    least = WITH_CORES if layer.dtype == torch.bfloat16 else least
    found = torch.cuda.get_device_capability(layer.device_index)
    if found >= least:
        return None
    return (
        f"triton needs a GPU of compute capability {least[0]}.{least[1]} for {layer.dtype}, this "
        f"one has {found[0]}.{found[1]}: use engine='dense'"
    )


def _same(x: Tensor, *_: Any) -> Tensor:
    """Leave activations as they are: [batch, features]."""
    return x
