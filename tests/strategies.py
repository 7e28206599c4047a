"""Hypothesis strategies: weights with ties, sparsities, configurations."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from topkast_func import TopKastConfig

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
) -> Tensor:
    """Finite weights: values in {−1, 0, 1} (heavy ties), all equal, or any floats."""
    size = draw(shapes() if shape is None else shape)
    dtype = draw(st.sampled_from(dtypes))
    elements = draw(
        st.sampled_from([
            st.sampled_from([-1.0, 0.0, 1.0]),
            st.just(0.0),
            st.floats(-100, 100, width=16),
        ])
    )
    return torch.from_numpy(draw(hnp.arrays(np.float64, size, elements=elements))).to(dtype)


def sparsities() -> st.SearchStrategy[float]:
    """Fractions in [0, 1), round ones and extremes among them."""
    return st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.999]) | st.floats(0, 1, exclude_max=True)


@st.composite
def configs(draw: st.DrawFn) -> TopKastConfig:
    """Configurations of any two ordered sparsities and any penalty."""
    backward, forward = sorted((draw(sparsities()), draw(sparsities())))
    return TopKastConfig(
        forward_sparsity=forward,
        backward_sparsity=backward,
        penalty=draw(st.sampled_from(["l2", "l1", "group_l2", None])),
        penalty_weight=draw(st.sampled_from([0.0, 0.1])),
    )
