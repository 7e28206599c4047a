"""For property tests of one's own: Hypothesis strategies, and what must hold of sets and states.

Needs Hypothesis: ``pip install 'topkast_func[testing]'``.
"""

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from topkast_func.block_masks import blocks, is_of_blocks
from topkast_func.config import TopKastConfig
from topkast_func.groups import grouped
from topkast_func.masks import compute_masks, counts, uneven_sets
from topkast_func.ranking import magnitudes
from topkast_func.tiebreak import tie_key as tie_key
from topkast_func.training.readout import dense_params, masks_of
from topkast_func.training.state import TrainState
from topkast_func.types import Masks, Params

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

MODERATE = st.floats(-100, 100, width=16)
"""Entries to compute with: none is so large or so small that a square is lost."""


def sides(most: int = 8) -> st.SearchStrategy[int]:
    """Sizes of one axis, 1 drawn on purpose."""
    return st.just(1) | st.integers(1, most)


@st.composite
def shapes(draw: st.DrawFn, ndim: int | None = None) -> tuple[int, ...]:
    """Shapes of a weight: two to four axes, 1×1, 1×n and n×1 among them."""
    axes = draw(st.integers(2, 4)) if ndim is None else ndim
    return tuple(draw(sides(8 if axis < 2 else 3)) for axis in range(axes))


@st.composite
def weights(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    entries: st.SearchStrategy[float] | None = None,
) -> Tensor:
    """Finite weights: values in {−1, 0, 1} (heavy ties), all zero, or any of ``entries``.

    Args:
        draw: Given by Hypothesis.
        shape: Shapes; None for those of `shapes`.
        dtypes: Floating dtypes.
        entries: Numbers such as `MODERATE`; None for every finite number of the dtype, the
            largest and the smallest among them.

    Returns:
        A weight.
    """
    size = draw(shapes() if shape is None else shape)
    dtype = draw(st.sampled_from(dtypes))
    most = torch.finfo(dtype).max
    free = st.floats(-most, most) if entries is None else entries
    elements = draw(st.sampled_from([st.sampled_from([-1.0, 0.0, 1.0]), st.just(0.0), free]))
    return torch.from_numpy(draw(hnp.arrays(np.float64, size, elements=elements))).to(dtype)


@st.composite
def blocked(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> tuple[Tensor, tuple[int, int]]:
    """Weights of `MODERATE` entries, each with a block shape (rows, columns) that divides it.

    Args:
        draw: Given by Hypothesis.
        dtypes: Floating dtypes.

    Returns:
        The weight and the block shape.
    """
    block, grid = ((draw(sides(4)), draw(sides(4))) for _ in range(2))
    rest = draw(st.sampled_from([(), (2,), (3, 2)]))
    shape = (block[0] * grid[0], block[1] * grid[1], *rest)
    return draw(weights(st.just(shape), dtypes, MODERATE)), block


@st.composite
def patterned(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> tuple[Tensor, TopKastConfig]:
    """Weights, each with a configuration of N:M sets that fits it; ties are likely.

    Args:
        draw: Given by Hypothesis.
        dtypes: Floating dtypes.

    Returns:
        The weight and the configuration, which selects parameters named "weight".
    """
    group = draw(st.integers(2, 8))
    kept, wider = sorted((draw(st.integers(1, group)), draw(st.integers(1, group))))
    rest = draw(st.sampled_from([(), (2,), (3, 2)]))
    shape = (draw(sides()), group * draw(sides(4)), *rest)
    config = TopKastConfig(pattern=f"{kept}:{group}", backward_sparsity=1.0 - wider / group)
    return draw(weights(st.just(shape), dtypes)), config


def sparsities() -> st.SearchStrategy[float]:
    """Fractions in [0, 1), round ones and extremes among them."""
    return st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.999]) | st.floats(0, 1, exclude_max=True)


@st.composite
def configs(draw: st.DrawFn) -> TopKastConfig:
    """Configurations of Top-KAST: any two ordered sparsities, any penalty."""
    backward, forward = sorted((draw(sparsities()), draw(sparsities())))
    return TopKastConfig(
        forward_sparsity=forward,
        backward_sparsity=backward,
        penalty=draw(st.sampled_from(["l2", "l1", "group_l2", None])),
        penalty_weight=draw(st.sampled_from([0.0, 0.1])),
    )


@st.composite
def masks(draw: st.DrawFn, shape: st.SearchStrategy[tuple[int, ...]] | None = None) -> Masks:
    """Sets of a weight at any two sparsities, ties among its values likely."""
    theta = draw(weights(shape, (torch.float32,)))
    return compute_masks({"weight": theta}, draw(configs()))["weight"]


def check_nested(masks: Mapping[str, Masks], params: Params) -> None:
    """Check that masks are bool, of the shape and device of their parameter, and A lies in B.

    Args:
        masks: Sets by name.
        params: Weights by name.

    Raises:
        AssertionError: They are not; the text names the parameter.
    """
    for name, sets in masks.items():
        _require(name in params, f"{name} is no parameter")
        _check_kind(name, sets, params[name])
        outside = int((sets.forward & ~sets.backward).sum())
        _require(outside == 0, f"{name}: {outside} entries of A are not in B")


def check_counts(
    masks: Mapping[str, Masks], params: Params, config: TopKastConfig, *, step: int = 0
) -> None:
    """Check that A and B have exactly as many entries as asked for, in each group of a pattern.

    Args:
        masks: Sets by name.
        params: Weights by name.
        config: The configuration.
        step: Number of the step that made the sets: from ``explore_until`` on, B is A.

    Raises:
        AssertionError: They have not; the text names the parameter.
    """
    asked = counts(params, config, step=step)
    _require(masks.keys() == asked.keys(), f"{[*masks]} are sparse, not {[*asked]}")
    for name, expected in asked.items():
        _check_kind(name, masks[name], params[name])
        found = tuple(int(mask.sum()) for mask in masks[name])
        _require(found == expected, f"{name}: {found} entries in A and B, not {expected}")
    for name in uneven_sets(masks, config):
        _require(False, f"{name}: groups of {config.group} have different numbers of entries")


def check_largest(masks: Mapping[str, Masks], params: Params, config: TopKastConfig) -> None:
    """Check that no entry left out ranks before one that is in, ties by their `tie_key`.

    Blocks must be in or out as a whole; with a pattern each group has a ranking of its own. A
    weight that holds NaN has no such sets.

    Args:
        masks: Sets by name, of a method that ranks by magnitude.
        params: Weights by name.
        config: Shape and norm of the blocks, or pattern.

    Raises:
        AssertionError: One does; the text names the parameter.
    """
    for name, sets in masks.items():
        scores = magnitudes(name, params[name], config.block_shape, config.block_norm)
        _require(not scores.isnan().any(), f"{name} holds NaN")
        _check_kind(name, sets, params[name])
        keys = tie_key(torch.arange(scores.numel(), device=scores.device)).view(scores.shape)
        by_key = grouped(keys, config.group).argsort(1)
        ranked = grouped(scores.abs(), config.group).gather(1, by_key)
        ranking = by_key.gather(1, ranked.sort(dim=1, descending=True, stable=True).indices)
        for mask in sets:
            whole = is_of_blocks(mask, config.block_shape)
            _require(whole, f"{name}: a block is in by a part of it")
            chosen = grouped(blocks(mask, config.block_shape), config.group).gather(1, ranking)
            told = f"{name}: an entry is in and one that ranks before it is not"
            _require(not (chosen[:, 1:] & ~chosen[:, :-1]).any(), told)


def check_outside_untouched(before: TrainState, after: TrainState) -> None:
    """Check that a step left θ outside B as it was.

    Args:
        before: The state before the step; no refresh is due.
        after: The state after it.

    Raises:
        AssertionError: It did not; the text names the parameter.
    """
    old, new = dense_params(before), dense_params(after)
    for name, sets in masks_of(before).items():
        outside = ~sets.backward.to(old[name].device)
        bits = [tensor[outside].view(torch.uint8) for tensor in (old[name], new[name])]
        moved = int((bits[0] != bits[1]).view(-1, old[name].itemsize).any(1).sum())
        _require(moved == 0, f"{name}: {moved} entries outside B have moved")


def _check_kind(name: str, sets: Masks, theta: Tensor) -> None:
    """Check that masks are bool, of the shape and device of their parameter."""
    for mask in sets:
        found = (mask.dtype, mask.shape, mask.device)
        _require(found == (torch.bool, theta.shape, theta.device), f"{name}: {found}")


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)
