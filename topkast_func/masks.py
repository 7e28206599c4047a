"""Choice of the forward set A and the backward set B of every parameter: exact counts."""

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from topkast_func.block_masks import blocks, spread
from topkast_func.checks import check_count
from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import allocate, shared_among_all
from topkast_func.groups import uneven
from topkast_func.leaves import check_present
from topkast_func.methods.base import Situation
from topkast_func.methods.contract import chosen, size_problem
from topkast_func.places import counted
from topkast_func.ranking import NO_GRADIENT, NO_RANKING, NaNParameterError, kept, magnitudes
from topkast_func.sparsity import Allocation
from topkast_func.types import Masks, Params


def compute_masks(
    params: Params, config: TopKastConfig, *, step: int = 0, seed: int = 0
) -> dict[str, Masks]:
    """Choose A and B of every sparse parameter, as training would start with them.

    Of n entries (or blocks) at sparsity s, k = max(1, floor((1 − s)·n + 1/2)) are kept; with a
    ``pattern`` so many of each group, n being M. In Top-KAST these are the largest in magnitude
    (or block norm), ties going in the order of `tie_key`, a fixed hash of the flat index, so
    evenly over the tensor. One ranking gives both sets, so A ⊆ B (NeurIPS 2020, section 2: top-K
    per tensor). They follow from the values alone.

    Args:
        params: Weights by name, floating point of any dtype and device.
        config: Selection, sparsities, blocks and method.
        step: Number of the step: sparsities may change, and from ``explore_until`` on B is A.
        seed: Seed of the methods that draw at random.

    Returns:
        Masks by name, on the device of the parameter; dense parameters are absent.

    Raises:
        TypeError: A leaf is not a floating-point or complex tensor, or is sparse, nested or of a
            class that computes in a way of its own.
        ValueError: A leaf is empty or on the meta device, a selected leaf is of complex numbers
            or not divisible into blocks, a pattern of the configuration does not fit the names,
            ``step`` or ``seed`` is out of range, or the call is made within `torch.func.grad` or
            `vmap`.
        NaNParameterError: A leaf holds NaN; a ValueError too.

    Departures:
        The paper rounds D·n without saying how; ties are not discussed there.

    Example:
        >>> config = TopKastConfig(forward_sparsity=0.75, backward_sparsity=0.5)
        >>> masks = compute_masks({"weight": torch.tensor([[3.0, -1.0], [-2.0, 2.0]])}, config)
        >>> masks["weight"].forward.int().tolist(), masks["weight"].backward.int().tolist()
        ([[1, 0], [0, 0]], [[1, 0], [0, 1]])
    """
    step, seed = check_count("step", step, 0), check_count("seed", seed, 0)
    allocations = allocate(params, config, step=step)
    for name, leaf in params.items():
        check_present(name, leaf)
    return starting_masks(params, allocations, config, step=step, seed=seed)


def starting_masks(
    params: Params,
    allocations: Mapping[str, Allocation],
    config: TopKastConfig,
    *,
    step: int = 0,
    seed: int = 0,
) -> dict[str, Masks]:
    """Choose A and B as `compute_masks` does, of parameters with sparsities that were allocated.

    Args:
        params: Weights by name, none of them on the meta device.
        allocations: Sparsities by name, of others too.
        config: See `compute_masks`.
        step: See `compute_masks`.
        seed: See `compute_masks`.

    Returns:
        Masks by name.

    Raises:
        ValueError: See `compute_masks`.
        NaNParameterError: See `compute_masks`; a ValueError too.
    """
    for name, leaf in params.items():
        if is_functorch_wrapped_tensor(leaf.detach()):
            raise ValueError(
                f"sets are chosen by numbers, and torch.func.grad and vmap hide those of {name!r}: "
                "call compute_masks outside of them, and pass the masks in"
            )
        if name not in allocations and leaf.isnan().any():
            raise NaNParameterError(f"params[{name!r}] holds NaN")
    own = {name: allocations[name] for name in params if name in allocations}
    return masks_at(params, own, config, step=step, seed=seed)


def counts(params: Params, config: TopKastConfig, *, step: int = 0) -> dict[str, tuple[int, int]]:
    """Return how many entries A and B have after the sets of a step were chosen.

    Args:
        params: Weights by name.
        config: The configuration.
        step: Number of the step: from ``explore_until`` on, B is A.

    Returns:
        |A| and |B| by name; dense parameters are absent.

    Raises:
        ValueError: See `allocate`.
    """
    shapes = {name: params[name].shape for name in params}
    return counts_by(shapes, allocate(params, config, step=step), config, step)


def counts_among(
    shapes: Mapping[str, Sequence[int]], config: TopKastConfig, step: int = 0
) -> dict[str, tuple[int, int]]:
    """Return what `counts` does, for parameters that are sparse already, by their shapes."""
    return counts_by(shapes, shared_among_all(shapes, config, step), config, step)


def counts_by(
    shapes: Mapping[str, Sequence[int]],
    allocations: Mapping[str, Allocation],
    config: TopKastConfig,
    step: int = 0,
) -> dict[str, tuple[int, int]]:
    """Return what `counts` does, for parameters whose sparsities are allocated, by their shapes."""
    size = math.prod(config.block_shape)
    found = {}
    for name, sparsity in allocations.items():
        forward, backward = _kept(sparsity, math.prod(shapes[name]) // size, config, step)
        found[name] = (forward * size, backward * size)
    return found


def _kept(sparsity: Allocation, units: int, config: TopKastConfig, step: int) -> tuple[int, int]:
    """Return how many of so many entries or blocks A and B have: equally many once B is A."""
    backward = sparsity.forward if config.schedule.settled(step) else sparsity.backward
    return kept(sparsity.forward, units, config.group), kept(backward, units, config.group)


def masks_at(
    params: Params,
    allocations: Mapping[str, Allocation],
    config: TopKastConfig,
    *,
    step: int = 0,
    seed: int = 0,
    old: Mapping[str, Masks] | None = None,
    gradients: Params | None = None,
) -> dict[str, Masks]:
    """Choose A and B of the parameters that are allocated a sparsity.

    Args:
        params: Weights by name.
        allocations: Sparsities by name.
        config: Method, blocks, and the end of exploration.
        step: Number of the step that comes next.
        seed: Seed of the methods that draw at random.
        old: The sets as they are; None at the start.
        gradients: Gradients of the loss at α by name, for the methods that read them.

    Returns:
        Masks by name.

    Raises:
        NaNParameterError: A parameter holds NaN, or a gradient is not finite; a ValueError too.
        ValueError: A parameter is not divisible into blocks, or the method has not chosen as many
            entries as it was asked for.
    """
    sets, situations = {}, {}
    block, norm = config.block_shape, config.block_norm
    active = {name: blocks(sets.forward, block) for name, sets in (old or {}).items()}
    endless = [~gradients[name].isfinite() for name in allocations] if gradients else []
    numbers = counted([*active.values(), *endless])
    held = dict(zip(active, numbers, strict=False))
    for name in compress(allocations, numbers[len(active) :]):
        reason = NO_RANKING if params[name].isnan().any() else NO_GRADIENT
        raise NaNParameterError(reason.format(name))
    for name, sparsity in allocations.items():
        theta = params[name].detach().as_subclass(Tensor)
        scores = magnitudes(name, theta, block, norm)
        situation = Situation(
            name,
            scores,
            *_kept(sparsity, scores.numel(), config, step),
            active=active[name].to(theta.device) if old else None,
            gradient=magnitudes(name, gradients[name].to(theta.device), block, norm)
            if gradients
            else None,
            progress=min(1.0, step / config.explore_until) if config.explore_until else 0.0,
            generator=_generator(seed, step, name),
            held=held.get(name, 0),
            group=config.group,
        )
        sets[name], situations[name] = chosen(config.method, situation), situation
    told = {name: telling(*both, config.group) for name, both in sets.items()}
    found = iter(counted([mask for masks in told.values() for mask in masks]))
    for name, situation in situations.items():
        problem = size_problem(config.method, situation, *(next(found) for _ in told[name]))
        if problem and params[name].isnan().any():
            raise NaNParameterError(NO_RANKING.format(name))
        if problem:
            raise ValueError(problem)
    return {n: Masks(*(spread(mask, block) for mask in both)) for n, both in sets.items()}


def telling(forward: Tensor, backward: Tensor, group: int | None) -> tuple[Tensor, ...]:
    """Return masks whose counts tell whether sets are right.

    Args:
        forward: 1_A.
        backward: 1_B.
        group: M; None where there are no groups.

    Returns:
        A, B, the entries of A in B and, where there are groups, those whose count in A or B is
        not that of the first group.
    """
    sizes = (forward, backward, forward & backward)
    if group is None:
        return sizes
    return *sizes, uneven(forward, group) | uneven(backward, group)


def _generator(seed: int, step: int, name: str) -> torch.Generator:
    """Return random numbers that depend on the arguments alone."""
    entropy = np.random.SeedSequence((seed, step, crc32(name.encode())))
    return torch.Generator("cpu").manual_seed(int(entropy.generate_state(1)[0]))


def uneven_sets(masks: Mapping[str, Masks], config: TopKastConfig) -> list[str]:
    """Name the parameters whose groups differ in their counts; the host waits once."""
    group = config.group
    if group is None:
        return []
    found = counted([uneven(a, group) | uneven(b, group) for a, b in masks.values()])
    return [name for name, groups in zip(masks, found, strict=True) if groups]
