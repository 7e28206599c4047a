"""Whole training steps: forward, backward, optimiser, on one batch again and again."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

import topkast_func as tk
from benchmarks import arms
from benchmarks.arms import ONEDNN
from benchmarks.networks import Problem, problem
from benchmarks.protocol import Parameters, Suite, Tasks

Pair: TypeAlias = tuple[float, float]  # forward and backward sparsity
Block: TypeAlias = tuple[int, int]
Arm: TypeAlias = tuple[str, dict[str, Any]]  # a name, and the parameters

PAIRS: tuple[Pair, ...] = ((0.5, 0.2), (0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))
USUAL: Pair = (0.9, 0.8)
FIXED: Pair = (0.9, 0.9)  # B is A, as SparseLab trains
BLOCKS: tuple[Block, ...] = ((4, 1), (1, 4), (4, 4))
SPARSELAB = (0.8, 0.9, 0.95)
ENGINES = ("numba", "dense", "reference", "torch_sparse")
NETWORKS = {
    "mlp-784": "784-512-512-10, batch 128",
    "mlp-1024": "1024, four layers, batch 256",
    "mlp-2048": "2048, three layers, batch 512",
    "encoder": "transformer block, 16 × 64 tokens of 256",
    "residual": "residual block, 32 images of 16 × 16 × 128",
}
SMALLEST, IMAGES, BATCHES = "mlp-784", "residual", (32, 512)

DENSE = ("dense", "dense compiled", "dense compiled, optimiser too")
OURS, PEER, LOOP = "topkast", "SparseLab", "sparsify"


def _sparsities(network: str) -> Iterator[Arm]:
    yield from (arm(way, network=network) for way in (*DENSE, ONEDNN))
    yield from (arm(OURS, pair, (1, 1), network=network) for pair in (*PAIRS, FIXED))
    if network == IMAGES:  # SparseLab has no convolutions
        return
    yield from (arm(PEER, (sparsity, sparsity), network=network) for sparsity in SPARSELAB)


def _blocks(network: str) -> Iterator[Arm]:
    yield from (arm(way, network=network) for way in (*DENSE, ONEDNN))
    yield from (arm(OURS, USUAL, block, network=network) for block in BLOCKS)
    yield from (arm(OURS, p, (4, 4), network=network) for p in PAIRS if p != USUAL)


def _engines() -> Iterator[Arm]:
    yield from map(arm, DENSE)
    for more in ({}, *({"engine": e} for e in ENGINES), {"penalty": "l2"}, {"storage": "dense"}):
        yield arm(OURS, USUAL, (1, 1), **more)


def _batch(size: int) -> Iterator[Arm]:
    yield from (arm(way, batch=size) for way in DENSE)
    for pair, block in ((USUAL, (1, 1)), (FIXED, (1, 1)), (USUAL, (4, 4))):
        yield arm(OURS, pair, block, batch=size)
    yield arm(PEER, FIXED, batch=size)


def _loops(network: str) -> Iterator[Arm]:
    for way in DENSE[:2]:
        yield arm(way, network=network, optimizer="adamw")
    for pair in PAIRS[1:4]:
        yield arm(LOOP, pair, network=network, optimizer="adamw")


def arm(way: str, pair: Pair | None = None, block: Block | None = None, **more: Any) -> Arm:
    """Return an arm, named after its way, its blocks, what is not the default, and its sparsities.

    The sparsities are those of forward and backward pass; what else it has is as `arms.training`
    takes it, and the ``network``.
    """
    unusual = [f"{key} {more[key]}" for key in ("engine", "penalty", "storage") if key in more]
    name = " ".join([way, *([f"{block[0]}×{block[1]}"] if block else []), *unusual])
    told = {"series": name, "network": SMALLEST, "way": way, "optimizer": "sgd", **more}
    if block:
        told["block_shape"] = block
    if pair is None:
        return name, told
    if way == OURS and pair[0] == pair[1]:
        told["series"] += ", B = A"
    told |= {"forward_sparsity": pair[0], "backward_sparsity": pair[1]}
    return f"{name} {100 * pair[0]:.0f}/{100 * pair[1]:.0f}", told


def _prepare(parameters: Parameters) -> Tasks:
    of_network = problem(parameters["network"], parameters.get("batch"))
    return {"step": (WAYS[parameters["way"]](of_network, parameters), _check)}


def _check(loss: Tensor) -> None:
    if not math.isfinite(float(loss)):
        raise ArithmeticError(f"the loss is {float(loss)}")


def _conventional(
    of_network: Problem, p: Parameters, *compiled: str, penalty: Callable[[], Any] = float
) -> Callable[[], Tensor]:
    """Return a step of `torch.optim`; the model, or it and the optimiser, may be compiled."""
    module = of_network.model
    optimizer = OPTIMIZERS[p["optimizer"]](module.parameters(), lr=1e-3)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(module(inputs), targets)

    forward = torch.compile(loss_of) if "model" in compiled else loss_of
    update = torch.compile(optimizer.step) if "optimizer" in compiled else optimizer.step

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = forward(of_network.inputs, of_network.targets) + penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        update()
        return loss.detach()

    return step


def _ordinary(of_network: Problem, p: Parameters) -> Callable[[], Tensor]:
    """Return a step of an ordinary loop after `tk.sparsify`, with the default penalty."""
    config = tk.TopKastConfig(p["forward_sparsity"], p["backward_sparsity"], refresh_every=None)
    sparsifier = tk.sparsify(of_network.model, config)
    dense_step = _conventional(of_network, p, penalty=sparsifier.penalty)

    def step() -> Tensor:
        loss = dense_step()
        sparsifier.step()
        return loss

    return step


def replaced(of_network: Problem, layer: Callable[[nn.Linear], nn.Module]) -> Problem:
    """Put other layers in the place of the linear ones of a network."""
    for name, module in list(of_network.model.named_modules()):
        if isinstance(module, nn.Linear):
            of_network.model.set_submodule(name, layer(module))
    return of_network


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, fused=True),
}
WAYS: dict[str, Callable[[Problem, Parameters], Callable[[], Tensor]]] = {
    "dense": _conventional,
    "dense compiled": lambda n, p: _conventional(n, p, "model"),
    "dense compiled, optimiser too": lambda n, p: _conventional(n, p, "model", "optimizer"),
    ONEDNN: lambda n, p: _conventional(replaced(n, arms.OneDNNLinear), p),
    PEER: lambda n, p: _conventional(
        replaced(n, partial(arms.sparselab, sparsity=p["forward_sparsity"])), p
    ),
    OURS: lambda n, p: arms.training(n, p).step,
    LOOP: _ordinary,
}  # each makes what trains one step and returns the loss
CASES = {
    **{f"{network}, sparsities": dict(_sparsities(network)) for network in NETWORKS},
    **{f"{network}, blocks": dict(_blocks(network)) for network in NETWORKS if network != IMAGES},
    f"{SMALLEST}, engines": dict(_engines()),
    **{f"{SMALLEST}, batch {size}": dict(_batch(size)) for size in BATCHES},
}  # each has dense arms of its own
SUITE = Suite("steps", CASES, _prepare)
LOOPS = Suite("loops", {network: dict(_loops(network)) for network in NETWORKS}, _prepare)
