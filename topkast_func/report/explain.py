"""Which engine computes each sparse layer, and why."""

import math

from topkast_func.checks import check_count
from topkast_func.kernels.costs import Layer, channels_of
from topkast_func.kernels.engines import ALPHA, Choice, EngineName, choose
from topkast_func.kernels.linear import described
from topkast_func.report.notes import UNKNOWN
from topkast_func.report.table import table
from topkast_func.training.readout import narrowed
from topkast_func.training.state import TrainState, check_one


def explain(
    state: TrainState, batch_size: int = 256, engine: EngineName = "auto"
) -> dict[str, Choice]:
    """Print which engine computes each sparse parameter, and why.

    The choice follows from shape, densities, block, dtype, device and the rows that a layer
    sees at a time; it is the same in every process. Of a state made of weights by name, not of
    a module, it is what they would get as weights of `nn.Linear` layers.

    Args:
        state: The state.
        batch_size: Rows of activations that a layer sees at a time, at least 1: for a sequence
            model batch times length, for a convolution batch times pixels.
        engine: What `make_train_step` is told.

    Returns:
        The choices by name.

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: The engine asked for does not support the dtype or device, or ``state`` is no
            state.
        ValueError: The batch size is below 1 or there is no such engine.

    Example:
        >>> import torch
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> state = init_state(torch.nn.Conv3d(4, 4, 1), TopKastConfig(), sgd(lr=0.1))
        >>> choices = explain(state)
        parameter     shape engine why
        weight    4×4×1×1×1  dense of no layer that kernels know
    """
    chosen, shapes = choices(state, batch_size, engine), state.weights.shapes()
    rows = [
        (name, "×".join(map(str, shapes[name])), choice.engine, choice.reason.removeprefix(ALPHA))
        for name, choice in chosen.items()
    ]
    print(table(("parameter", "shape", "engine", "why"), rows, last="<"))
    return chosen


def choices(state: TrainState, batch_size: int, engine: EngineName) -> dict[str, Choice]:
    """Return which engine computes each sparse parameter; see `explain`."""
    check_one(state)
    batch = check_count("batch_size", batch_size, 1)
    values, shapes = narrowed(state.weights.values, state.narrow), state.weights.shapes()
    patterns = state.weights.patterns
    chosen = {}
    for name in state.weights.sparse_names:
        if name in patterns:
            shape = shapes[name]
            matrix = shape[0], math.prod(shape[1:])
            layer = described(values[name], patterns[name], matrix, batch, channels_of(shape))
            chosen[name] = choose(engine, Layer(*layer))
        else:
            compact = state.weights.index_of(name) is not None
            why = UNKNOWN if compact else "storage='dense'"
            chosen[name] = Choice("dense", ALPHA + why)
    return chosen
