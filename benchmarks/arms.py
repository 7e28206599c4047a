"""How this library is called: the one module that knows its names."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

import topkast_func as tk
from benchmarks.networks import Problem
from benchmarks.protocol import Parameters
from topkast_func.kernels import EngineName, engines, pattern_of, sparse_linear
from topkast_func.model.alpha import split

OPTIMIZERS: dict[str, Callable[[float], tk.Optimizer]] = {
    "sgd": lambda lr: tk.sgd(lr, momentum=0.9),
    "adam": tk.adam,
}


class Products(NamedTuple):
    """The products of one weight on operands that are packed already.

    Attributes:
        forward: One forward product, of A.
        input_gradient: One input gradient, through A.
        weight_gradient: One weight gradient, sampled on B.
        layer: ``layer(x, values)``, the differentiable product with its packing.
        values: Values on B.
        unpack: Brings the activations that the first two return to [batch, features].
        gather: Gathers the values on B from a matrix.
    """

    forward: Callable[[], Any]
    input_gradient: Callable[[], Any]
    weight_gradient: Callable[[], Any]
    layer: Callable[[Tensor, Tensor], Tensor]
    values: Tensor
    unpack: Callable[[Any], Tensor]
    gather: Callable[[Tensor], Tensor]


class Training(NamedTuple):
    """A training that is under way.

    Attributes:
        step: Trains one step and returns the loss.
        state: Returns the state that the next step starts from.
        config: Its configuration.
    """

    step: Callable[[], Tensor]
    state: Callable[[], tk.TrainState]
    config: tk.TopKastConfig


def sets(
    weight: Tensor, forward: float, backward: float, block_shape: tuple[int, int] = (1, 1)
) -> tk.Masks:
    """Choose A and B of one weight.

    Args:
        weight: [out, in].
        forward: Forward sparsity, fraction.
        backward: Backward sparsity, fraction.
        block_shape: Of the blocks that are chosen whole.

    Returns:
        The masks.
    """
    config = tk.TopKastConfig(forward, backward, block_shape=block_shape)
    return tk.compute_masks({"weight": weight}, config)["weight"]


def products(
    weight: Tensor,
    masks: tk.Masks,
    x: Tensor,
    g: Tensor,
    block_shape: tuple[int, int],
    engine: EngineName,
) -> Products:
    """Prepare the products of one weight.

    Args:
        weight: [out, in].
        masks: Its sets.
        x: Inputs, [batch, in].
        g: Gradient of the outputs, [batch, out].
        block_shape: Of the blocks in the sets.
        engine: Name of the engine.

    Returns:
        The products.
    """
    pattern = pattern_of(masks.forward, masks.backward, block_shape)
    places = pattern.flat_index(block_shape, weight.shape)
    values = split(weight, places)
    (rows, columns), batch = weight.shape, len(x)
    raw, (pack, unpack) = engines.engine(engine), engines.layout(engine)
    x_packed, g_packed = pack(x), pack(g)
    return Products(
        forward=lambda: raw.forward(values, x_packed, pattern, rows),
        input_gradient=lambda: raw.input_gradient(values, g_packed, pattern, columns),
        weight_gradient=lambda: raw.weight_gradient(g_packed, x_packed, pattern, values),
        layer=lambda x, values: sparse_linear(x, values, pattern, (rows, columns), None, engine),
        values=values,
        unpack=lambda packed: unpack(packed, batch),
        gather=lambda matrix: split(matrix, places),
    )


def training(problem: Problem, parameters: Parameters) -> Training:
    """Start a training of a network.

    Args:
        problem: The network and its batch.
        parameters: ``forward_sparsity``, ``backward_sparsity``, ``optimizer``, and where they
            are not the default ``block_shape``, ``engine``, ``penalty``, ``storage``, ``lr``.

    Returns:
        The training.
    """
    config = config_of(problem, parameters)
    optimizer = OPTIMIZERS[parameters["optimizer"]](parameters.get("lr", 1e-3))
    storage = parameters.get("storage", "compact")
    state = tk.init_state(problem.model, config, optimizer, storage=storage)
    engine = parameters.get("engine", "auto")
    train_step = tk.make_train_step(problem.model, _loss, config, optimizer, engine=engine)
    batch = (problem.inputs, problem.targets)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics.loss

    return Training(step, lambda: state, config)


def config_of(problem: Problem, parameters: Parameters) -> tk.TopKastConfig:
    """Return the configuration of a training; weights that blocks do not divide stay dense.

    Args:
        problem: The network.
        parameters: As `training` takes them.

    Returns:
        The configuration, without refreshes.
    """
    rows, columns = parameters.get("block_shape", (1, 1))
    weights = {name: p for name, p in problem.model.named_parameters() if p.ndim == 2}
    divided = [n for n, p in weights.items() if p.shape[0] % rows == 0 == p.shape[1] % columns]
    return tk.TopKastConfig(
        forward_sparsity=parameters["forward_sparsity"],
        backward_sparsity=parameters["backward_sparsity"],
        sparse=divided,
        refresh_every=None,
        penalty=parameters.get("penalty"),
        block_shape=(rows, columns),
    )


def trained_bytes(state: tk.TrainState) -> dict[str, float]:
    """Count the bytes of a state, exactly, from its tensors.

    Args:
        state: A compact state.

    Returns:
        ``trained state``: values, indices, slots, and a gradient of the values' size;
        ``theta``: the dense θ, which can stay on the host.
    """
    values = state.weights.values()
    kept = _leaves(state.weights)
    theta = _leaves(state.weights.theta)
    indices = _distinct(kept) - _distinct([*theta, *values.values()])
    slots = _distinct(_leaves(state.optimizer.slots))
    gradient = sum(value.nbytes for value in values.values())
    return {
        "trained state": float(_distinct(list(values.values())) + gradient + slots + indices),
        "theta": float(_distinct(theta)),
    }


def _distinct(tensors: list[Tensor]) -> int:
    """Add the bytes of tensors, those that share memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for node in inner if not isinstance(node, str | int) for leaf in _leaves(node)]


def _loss(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return functional.cross_entropy(apply(inputs), targets)
