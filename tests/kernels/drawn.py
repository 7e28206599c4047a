"""Any problems, drawn by Hypothesis."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.kernels.problems import DTYPES, Problem, problem_of


@st.composite
def problems(draw: st.DrawFn, blocks: list[tuple[int, int]] | None = None) -> Problem:
    """Problems of any sets of blocks, none of them and all of them included; A is not empty."""
    block = draw(st.sampled_from(blocks or [(1, 1), (2, 1), (1, 3), (2, 2)]))
    grid = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    sets = hnp.arrays(np.bool_, grid, elements=st.booleans())
    active, chosen = (torch.from_numpy(draw(sets | st.just(np.ones(grid, bool)))) for _ in "AB")
    active[draw(st.integers(0, grid[0] - 1)), draw(st.integers(0, grid[1] - 1))] = True
    return problem_of(active, chosen, block, draw(st.sampled_from(DTYPES)))
