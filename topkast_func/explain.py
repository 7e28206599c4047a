"""Which engine computes each sparse layer, and why."""

from topkast_func.config import check_count
from topkast_func.kernels.engines import Choice, EngineName, choose
from topkast_func.kernels.linear import layer_of
from topkast_func.state import TrainState


def explain(
    state: TrainState, batch_size: int = 256, engine: EngineName = "auto"
) -> dict[str, Choice]:
    """Print which engine computes each sparse parameter, and why.

    The choice follows from shape, densities, block, dtype, device and the rows that a layer
    sees at a time; it is the same in every process.

    Args:
        state: The state.
        batch_size: Rows of activations that a layer sees at a time, at least 1: for a sequence
            model batch times length.
        engine: What `make_train_step` is told.

    Returns:
        The choices by name.

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: The engine asked for does not support the dtype or device.
        ValueError: The batch size is below 1 or there is no such engine.

    Example:
        >>> import torch
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> state = init_state(torch.nn.Conv1d(4, 4, 3), TopKastConfig(), sgd(lr=0.1))
        >>> choices = explain(state)
        weight [4, 4, 3]: dense, computed with all of α: not a linear layer, or dense storage
    """
    batch = check_count("batch_size", batch_size, 1)
    values, shapes = state.weights.values(), state.weights.shapes()
    patterns = state.weights.layers()
    choices = {}
    for name in state.weights.sparse():
        if name in patterns:
            rows, columns = shapes[name]
            layer = layer_of(values[name], patterns[name], (rows, columns), batch)
            choices[name] = choose(engine, layer)
        else:
            choices[name] = Choice(
                "dense", "computed with all of α: not a linear layer, or dense storage"
            )
        print(f"{name} {list(shapes[name])}: {choices[name].engine}, {choices[name].reason}")
    return choices
