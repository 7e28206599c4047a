"""How sparse each parameter is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from topkast_func.checks import check_count, check_order, check_type
from topkast_func.config.selection import matched_by, select, undivided
from topkast_func.config.topkast_config import TopKastConfig
from topkast_func.methods.contract import allocated
from topkast_func.ranking import kept
from topkast_func.sparsity import Allocation, ByPattern, density
from topkast_func.trees import check_params
from topkast_func.types import Params


def allocate(params: Params, config: TopKastConfig, *, step: int = 0) -> dict[str, Allocation]:
    """Say how sparse each parameter is to be.

    With ``allocation="erk"`` the density of a tensor is proportional to the sum of its sizes
    over their product, up to 1: what a dense tensor leaves over goes to the others (Mocanu et
    al., 2018; Evci et al., 2020, "Rigging the Lottery", section 3). The entries (or blocks) of
    all tensors together are exactly those of the uniform sparsity, max(1, floor(D·n + 1/2)) of
    their n; the same holds for B. Densities given by pattern are those of A; those of B are in
    the same proportion to them as in the uniform allocation, up to 1.

    Args:
        params: Weights by name.
        config: The configuration.
        step: Number of the step, where sparsities change over time.

    Returns:
        The sparsities by name. Dense parameters are absent.

    Raises:
        TypeError: A leaf is not a floating-point tensor, ``config`` no configuration, or ``step``
            no integer.
        ValueError: A leaf is empty, ``step`` is negative, a pattern matches no name, two patterns
            disagree, or a parameter has a forward but no backward sparsity, or one larger than it,
            or is not divisible into blocks or groups.

    Example:
        >>> import torch
        >>> params = {"a.weight": torch.zeros(8, 8), "b.weight": torch.zeros(2, 8)}
        >>> config = TopKastConfig(0.5, 0.5, allocation="erk")
        >>> {name: a.forward_density for name, a in allocate(params, config).items()}
        {'a.weight': 0.390625, 'b.weight': 0.9375}
    """
    check_type("config", config, TopKastConfig)
    step = check_count("step", step, 0)
    check_params(params)
    if not config.method.sparsifies:
        return {}
    return shared({name: params[name].shape for name in select(params, config)}, config, step)


def shared(
    shapes: Mapping[str, Sequence[int]], config: TopKastConfig, step: int = 0
) -> dict[str, Allocation]:
    """Share the sparsity out among the selected parameters; see `allocate`.

    Args:
        shapes: Their shapes by name.
        config: The configuration.
        step: Number of the step.

    Returns:
        The sparsities by name.

    Raises:
        ValueError: See `allocate`.
    """
    if not shapes:
        return {}
    wanted, wanted_back = config.sparsities(step)
    forward = _by_name("forward_sparsity", wanted, shapes)
    backward = forward
    if config.method.explores:
        backward = _by_name("backward_sparsity", wanted_back, forward)
    for name in forward:
        if name not in backward:
            raise ValueError(f"no pattern of backward_sparsity matches {name!r}")
        if field := undivided(shapes[name], config):
            shape = tuple(shapes[name])
            raise ValueError(f"{field} does not divide params[{name!r}] of shape {shape}")
        check_order(forward[name], backward[name], name=f"backward_sparsity of {name!r}")
    asked = {name: Allocation(forward[name], backward[name]) for name in forward}
    if isinstance(config.allocation, ByPattern):
        asked |= _given(config.allocation, asked)
    found = {name: allocated(config.method, both, step) for name, both in asked.items()}
    return _erdos_renyi(shapes, found, config) if config.allocation == "erk" else found


def shared_among_all(
    shapes: Mapping[str, Sequence[int]], config: TopKastConfig, step: int = 0
) -> dict[str, Allocation]:
    """Share the sparsity out among parameters that are sparse already; see `allocate`.

    Args:
        shapes: Their shapes by name.
        config: The configuration.
        step: Number of the step.

    Returns:
        The sparsities of them all by name.

    Raises:
        ValueError: The configuration gives one of them no sparsity, or see `allocate`.
    """
    found = shared(shapes, config, step)
    if forgotten := [name for name in shapes if name not in found]:
        raise ValueError(
            f"the configuration gives {forgotten} no sparsity, which are sparse: it is not the "
            "one that made the sets"
        )
    return found


def given_sparsity(params: Params, config: TopKastConfig) -> list[str]:
    """Name the parameters that are given a sparsity, whatever the method makes of it.

    Args:
        params: The parameter tree.
        config: The configuration.

    Returns:
        Names; those of `allocate`, unless the method is dense.

    Raises:
        ValueError: See `select`.
    """
    return list(_by_name("forward_sparsity", config.sparsities(0)[0], select(params, config)))


def _given(densities: ByPattern, uniform: dict[str, Allocation]) -> dict[str, Allocation]:
    found = {}
    for name, forward in _by_name("allocation", densities, uniform).items():
        usual = uniform[name]
        wider = min(1.0, forward * usual.backward_density / usual.forward_density)
        found[name] = Allocation(density(forward), density(wider))
    return found


def _erdos_renyi(
    shapes: Mapping[str, Sequence[int]], uniform: dict[str, Allocation], config: TopKastConfig
) -> dict[str, Allocation]:
    size = math.prod(config.block_shape)
    units = {name: math.prod(shapes[name]) // size for name in uniform}
    scores = {name: sum(shapes[name] or (1,)) / math.prod(shapes[name]) for name in uniform}
    total, least = sum(units.values()), dict.fromkeys(uniform, 1)
    counts = []
    for sparsity in next(iter(uniform.values())):
        least = _apportioned(kept(sparsity, total), scores, units, least)
        counts.append(least)
    return {
        name: Allocation(*(1.0 - count[name] / units[name] for count in counts)) for name in uniform
    }


def _apportioned(
    total: int, scores: Mapping[str, float], units: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int]:
    """Share ``total`` units out, in proportion to score times size, between least and all."""
    full: set[str] = set()
    while True:
        free = [name for name in units if name not in full]
        left = total - sum(units[name] for name in full)
        scale = left / sum(scores[name] * units[name] for name in free) if free else 0.0
        over = {name for name in free if scale * scores[name] > 1.0}
        if not over:
            break
        full |= over
    wanted = {n: units[n] if n in full else scale * scores[n] * units[n] for n in units}
    counts = {n: min(max(math.floor(wanted[n]), least[n]), units[n]) for n in units}
    while missing := max(total, sum(least.values())) - sum(counts.values()):
        step = 1 if missing > 0 else -1
        able = [n for n in units if least[n] <= counts[n] + step <= units[n]]
        able.sort(key=lambda name: step * (counts[name] - wanted[name]))
        for name in able[: abs(missing)]:
            counts[name] += step
    return counts


def _by_name(field: str, sparsity: Any, names: Iterable[str]) -> dict[str, float]:
    if not isinstance(sparsity, ByPattern):
        return dict.fromkeys(names, sparsity)
    found: dict[str, float] = {}
    for glob, value in sparsity.items():
        for name in matched_by(field, glob, sparsity.matching(glob, names), names):
            if found.setdefault(name, value) != value:
                raise ValueError(
                    f"{field} gives {name!r} both {found[name]} and {value} (pattern {glob!r})"
                )
    return found
