"""Whole training steps: forward, backward, optimiser, on one batch again and again."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import topkast_func as tk
from benchmarks.networks import Problem, loss_fn, problem
from benchmarks.products import ONEDNN, OneDNNLinear
from benchmarks.protocol import Parameters, Suite, Tasks

Pair: TypeAlias = tuple[float, float]  # forward and backward sparsity
Block: TypeAlias = tuple[int, int]

PAIRS: tuple[Pair, ...] = ((0.5, 0.2), (0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))
USUAL: Pair = (0.9, 0.8)
FIXED: Pair = (0.9, 0.9)  # B is A, as SparseLab trains
ENTRIES, SQUARE = (1, 1), (4, 4)
BLOCKS: tuple[Block, ...] = ((4, 1), (1, 4), SQUARE)
SPARSELAB = ((0.8, 0.8), FIXED, (0.95, 0.95))
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


def arms(
    ways: Iterable[str],
    pairs: Iterable[tuple[float, ...]] = ((),),
    blocks: Iterable[tuple[int, ...]] = ((),),
    **more: Any,
) -> dict[str, Parameters]:
    """Return an arm for every way, every pair of sparsities and every shape of blocks.

    It is named after its way, its blocks, what is not the default, and its sparsities, those of
    forward and backward pass; what else it has is as `training` takes it, and the ``network``.
    """
    unusual = [f"{key} {more[key]}" for key in ("engine", "penalty", "storage") if key in more]
    found: dict[str, Parameters] = {}
    for way, pair, block in product(ways, pairs, blocks):
        name = " ".join([way, *(["×".join(map(str, block))] if block else []), *unusual])
        series = f"{name}, B = A" if way == OURS and len({*pair}) == 1 else name
        told = {"series": series, "network": SMALLEST, "way": way, "optimizer": "sgd", **more}
        told |= {"block_shape": block} if block else {}
        told |= zip(("forward_sparsity", "backward_sparsity"), pair, strict=False)
        shown = "/".join(f"{100 * sparsity:.0f}" for sparsity in pair)
        found[f"{name} {shown}".strip()] = told
    return found


def _cases() -> Iterator[tuple[str, dict[str, Parameters]]]:
    """Yield the arms of each case; it has dense ones of its own."""
    for network in NETWORKS:
        of = partial(arms, network=network)
        dense, entries = of((*DENSE, ONEDNN)), of([OURS], (*PAIRS, FIXED), [ENTRIES])
        theirs = {} if network == IMAGES else of([PEER], SPARSELAB)  # it has no convolutions
        yield f"{network}, sparsities", dense | entries | theirs
        if theirs:
            blocks = of([OURS], [USUAL], BLOCKS) | of([OURS], PAIRS, [SQUARE])
            yield f"{network}, blocks", dense | blocks
    engines = arms(DENSE)
    for more in ({}, *({"engine": e} for e in ENGINES), {"penalty": "l2"}, {"storage": "dense"}):
        engines |= arms([OURS], [USUAL], [ENTRIES], **more)
    yield f"{SMALLEST}, engines", engines
    for size in BATCHES:
        of = partial(arms, batch=size)
        ours = of([OURS], [USUAL, FIXED], [ENTRIES]) | of([OURS], [USUAL], [SQUARE])
        yield f"{SMALLEST}, batch {size}", of(DENSE) | ours | of([PEER], [FIXED])


class Training(NamedTuple):
    """A training under way: one step, which returns its loss; the state; the configuration."""

    step: Callable[[], Tensor]
    state: Callable[[], tk.TrainState]
    config: tk.TopKastConfig


def training(on: Problem, p: Parameters, **options: Any) -> Training:
    """Start a training of a network; options are those of `tk.make_train_step`.

    Its parameters are ``forward_sparsity``, ``backward_sparsity``, ``optimizer``, and where they
    are not the default ``block_shape``, ``penalty``, ``storage``, ``lr``, and ``refresh_every``.
    Weights that the blocks do not divide stay dense.
    """
    rows, columns = p.get("block_shape", (1, 1))
    config = tk.TopKastConfig(
        p["forward_sparsity"],
        p["backward_sparsity"],
        sparse=lambda _, w: w.ndim > 1 and w.shape[0] % rows == 0 == w.shape[1] % columns,
        refresh_every=p.get("refresh_every"),
        penalty=p.get("penalty"),
        block_shape=(rows, columns),
    )
    optimizer = OPTIMIZERS[p["optimizer"]][0](p.get("lr", 1e-3))
    state = tk.init_state(on.model, config, optimizer, storage=p.get("storage", "compact"))
    train_step = tk.make_train_step(on.model, loss_fn, config, optimizer, **options)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train_step(state, on.batch)
        return metrics.loss

    return Training(step, lambda: state, config)


def _prepare(p: Parameters) -> Tasks:
    on = problem(p["network"], p.get("batch"), p.get("dtype", "float32"))
    return {"step": (WAYS[p["way"]](on, p), _check)}


def _check(loss: Tensor) -> None:
    if not math.isfinite(float(loss)):
        raise ArithmeticError(f"the loss is {float(loss)}")


def _conventional(
    of_network: Problem, p: Parameters, *compiled: str, penalty: Callable[[], Any] = float
) -> Callable[[], Tensor]:
    """Return a step of `torch.optim`; the model, or it and the optimiser, may be compiled."""
    optimizer = OPTIMIZERS[p["optimizer"]][1](of_network.model.parameters(), lr=1e-3)
    forward = torch.compile(loss_fn) if "model" in compiled else loss_fn
    update = torch.compile(optimizer.step) if "optimizer" in compiled else optimizer.step

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = forward(of_network.model, of_network.batch) + penalty()
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


def _sparselab(of_network: Problem, p: Parameters) -> Callable[[], Tensor]:
    """Return a step through SparseLab's layers, with weights that they draw; A is their B."""
    layer = partial(import_module("sparselab").SparseLinear, sparsity=p["forward_sparsity"])
    theirs = replaced(of_network, lambda own: layer(own.in_features, own.out_features))
    return _conventional(theirs, p)


OPTIMIZERS: dict[str, tuple[Callable[..., tk.Optimizer], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (partial(tk.sgd, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
    "adam": (tk.adam, torch.optim.Adam),
    "adamw": (tk.adamw, partial(torch.optim.AdamW, fused=True)),
}  # of this library, and of torch
WAYS: dict[str, Callable[[Problem, Parameters], Callable[[], Tensor]]] = {
    "dense": _conventional,
    "dense compiled": lambda n, p: _conventional(n, p, "model"),
    "dense compiled, optimiser too": lambda n, p: _conventional(n, p, "model", "optimizer"),
    ONEDNN: lambda n, p: _conventional(replaced(n, OneDNNLinear), p),
    PEER: _sparselab,
    OURS: lambda n, p: training(n, p, engine=p.get("engine", "auto")).step,
    LOOP: _ordinary,
}  # each makes what trains one step and returns the loss
SUITE = Suite("steps", dict(_cases()), _prepare)
_fused = partial(arms, optimizer="adamw")
_LOOPS = {n: _fused(DENSE[:2], network=n) | _fused([LOOP], PAIRS[1:4], network=n) for n in NETWORKS}
LOOPS = Suite("loops", _LOOPS, _prepare)
_half, _OURS = partial(arms, dtype="bfloat16"), ([OURS], PAIRS[1:4], [ENTRIES, SQUARE])
_LARGER = ("mlp-1024", "mlp-2048", "encoder", "gpt2")
_HALVES = {n: _half(DENSE, network=n) | _half(*_OURS, network=n) for n in _LARGER}
HALVES = Suite("halves", _HALVES, _prepare)
