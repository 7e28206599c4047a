"""Whole training steps: forward, backward, optimiser, on one batch again and again."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import arms
from benchmarks.networks import Problem, problem, replaced
from benchmarks.peers import OneDNNLinear, TorchSparseLinear, sparselab_linear
from benchmarks.protocol import Arm, Case, Parameters, Task

Pair: TypeAlias = tuple[float, float]
Block: TypeAlias = tuple[int, int]

PAIRS: tuple[Pair, ...] = ((0.5, 0.2), (0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))
"""Forward and backward sparsities of a training that explores."""

USUAL: Pair = (0.9, 0.8)
FIXED: Pair = (0.9, 0.9)
"""B is A, as SparseLab trains."""

BLOCKS: tuple[Block, ...] = ((4, 1), (1, 4), (4, 4))
SWEPT_BLOCK: Block = (4, 4)
SPARSELAB = (0.8, 0.9, 0.95)
ENGINES = ("numba", "dense", "reference", "torch_sparse")
NETWORKS = ("mlp-784", "mlp-1024", "mlp-2048", "encoder")
SMALLEST, WITH_ADAM = "mlp-784", "mlp-1024"
BATCHES = (32, 512)

DENSE = ("dense", "dense compiled", "dense compiled, optimiser too")
ONEDNN = "dense oneDNN"
OURS, SEED_WAY, PEER = "topkast", "torch-sparse", "SparseLab"


def cases(full: bool) -> list[Case]:
    """Return the cases: per network the sparsities and the blocks; then the other axes.

    Args:
        full: All of them; a quick run has a few arms of the smallest network.

    Returns:
        The cases. Each has dense arms of its own.
    """
    return list(_all_cases() if full else _quick_cases())


def _all_cases() -> Iterator[Case]:
    for network in NETWORKS:
        yield Case(f"{network}, sparsities", tuple(_sparsities(network)))
        yield Case(f"{network}, blocks", tuple(_blocks(network)))
    yield Case(f"{SMALLEST}, engines", tuple(_engines(SMALLEST)))
    for batch in BATCHES:
        yield Case(f"{SMALLEST}, batch {batch}", tuple(_usual(SMALLEST, batch=batch)))
    yield Case(f"{WITH_ADAM}, adam", tuple(_usual(WITH_ADAM, optimizer="adam")))


def _quick_cases() -> Iterator[Case]:
    yield Case(f"{SMALLEST}, sparsities", tuple(_usual(SMALLEST)))


def _sparsities(network: str) -> Iterator[Arm]:
    yield from _dense(network, (*DENSE, ONEDNN))
    for pair in (*PAIRS, FIXED):
        yield ours(network, pair)
    for sparsity in SPARSELAB:
        yield _sparselab(network, sparsity)


def _blocks(network: str) -> Iterator[Arm]:
    yield from _dense(network, (*DENSE, ONEDNN))
    for block in BLOCKS:
        yield ours(network, USUAL, block)
    for pair in PAIRS:
        if pair != USUAL:
            yield ours(network, pair, SWEPT_BLOCK)


def _engines(network: str) -> Iterator[Arm]:
    yield from _dense(network, DENSE)
    yield ours(network, USUAL)
    for engine in ENGINES:
        yield ours(network, USUAL, engine=engine)
    yield ours(network, USUAL, penalty="l2")
    yield ours(network, USUAL, storage="dense")
    yield _torch_sparse(network, *USUAL, "on B")
    yield _torch_sparse(network, USUAL[0], USUAL[0], "on A")


def _usual(network: str, **more: Any) -> Iterator[Arm]:
    yield from _dense(network, DENSE, **more)
    yield ours(network, USUAL, **more)
    yield ours(network, FIXED, **more)
    yield ours(network, USUAL, SWEPT_BLOCK, **more)
    yield _sparselab(network, FIXED[0], **more)


def _arm(series: str, name: str, network: str, way: str, **more: Any) -> Arm:
    told = {"series": series, "network": network, "way": way, "optimizer": "sgd", **more}
    return Arm(name, told)


def _dense(network: str, ways: tuple[str, ...], **more: Any) -> Iterator[Arm]:
    for way in ways:
        yield _arm(way, way, network, way, **more)


def ours(network: str, pair: Pair, block: Block = (1, 1), **more: Any) -> Arm:
    """Return an arm of this library, named after what is not the default.

    Args:
        network: Name of the network.
        pair: Forward and backward sparsity, fractions.
        block: Block shape.
        **more: Further parameters, as `prepare` takes them.

    Returns:
        The arm.
    """
    unusual = [f"{key} {more[key]}" for key in ("engine", "penalty", "storage") if key in more]
    name = " ".join([OURS, f"{block[0]}×{block[1]}", *unusual])
    series = f"{name}, B = A" if pair[0] == pair[1] else name
    sparsities = {"forward_sparsity": pair[0], "backward_sparsity": pair[1]}
    name = f"{name} {shown(pair)}"
    return _arm(series, name, network, OURS, **sparsities, block_shape=block, **more)


def _torch_sparse(network: str, forward: float, backward: float, where: str) -> Arm:
    series = f"{SEED_WAY} {where}"
    sparsities = {"forward_sparsity": forward, "backward_sparsity": backward}
    name = f"{series} {shown((forward, backward))}"
    return _arm(series, name, network, SEED_WAY, **sparsities)


def _sparselab(network: str, sparsity: float, **more: Any) -> Arm:
    sparsities = {"forward_sparsity": sparsity, "backward_sparsity": sparsity}
    name = f"{PEER} {shown((sparsity, sparsity))}"
    return _arm(PEER, name, network, PEER, **sparsities, **more)


def shown(pair: Pair) -> str:
    """Write sparsities as they are spoken: 90/80.

    Args:
        pair: Forward and backward sparsity, fractions.

    Returns:
        Both in per cent.
    """
    return "/".join(f"{100 * sparsity:.0f}" for sparsity in pair)


def prepare(parameters: Parameters) -> list[Task]:
    """Prepare the step of an arm.

    Args:
        parameters: Of the arm.

    Returns:
        One task.
    """
    of_network = problem(parameters["network"], parameters.get("batch"))
    return [Task("step", step_of(of_network, parameters), _check)]


def step_of(of_network: Problem, parameters: Parameters) -> Callable[[], Tensor]:
    """Build the step of an arm.

    Args:
        of_network: The network and its batch.
        parameters: Of the arm.

    Returns:
        A function that trains one step and returns the loss.
    """
    return WAYS[parameters["way"]](of_network, parameters)


def _check(loss: Tensor) -> None:
    if not math.isfinite(float(loss)):
        raise ArithmeticError(f"the loss is {float(loss)}")


def _conventional(
    of_network: Problem, parameters: Parameters, model: str = "eager", optimizer: str = "eager"
) -> Callable[[], Tensor]:
    """Return a step of `torch.optim`; the model, or it and the optimiser, may be compiled."""
    module = of_network.model
    optim = OPTIMIZERS[parameters["optimizer"]](module.parameters())

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(module(inputs), targets)

    forward = torch.compile(loss_of) if model == "compiled" else loss_of
    update = torch.compile(optim.step) if optimizer == "compiled" else optim.step

    def step() -> Tensor:
        optim.zero_grad()
        loss = forward(of_network.inputs, of_network.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        update()
        return loss.detach()

    return step


def _with_onednn(of_network: Problem, parameters: Parameters) -> Callable[[], Tensor]:
    model = replaced(of_network.model, lambda _, linear: OneDNNLinear(linear))
    return _conventional(of_network._replace(model=model), parameters)


def _with_torch_sparse(of_network: Problem, parameters: Parameters) -> Callable[[], Tensor]:
    pair = parameters["forward_sparsity"], parameters["backward_sparsity"]
    model = replaced(
        of_network.model,
        lambda _, linear: TorchSparseLinear(linear, arms.sets(linear.weight.detach(), *pair)),
    )
    return _conventional(of_network._replace(model=model), parameters)


def _with_sparselab(of_network: Problem, parameters: Parameters) -> Callable[[], Tensor]:
    sparsity = parameters["forward_sparsity"]
    model = replaced(of_network.model, lambda _, linear: sparselab_linear(linear, sparsity))
    return _conventional(of_network._replace(model=model), parameters)


def _with_ours(of_network: Problem, parameters: Parameters) -> Callable[[], Tensor]:
    return arms.training(of_network, parameters).step


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}

WAYS: dict[str, Callable[[Problem, Parameters], Callable[[], Tensor]]] = {
    "dense": _conventional,
    "dense compiled": partial(_conventional, model="compiled"),
    "dense compiled, optimiser too": partial(_conventional, model="compiled", optimizer="compiled"),
    ONEDNN: _with_onednn,
    OURS: _with_ours,
    SEED_WAY: _with_torch_sparse,
    PEER: _with_sparselab,
}
