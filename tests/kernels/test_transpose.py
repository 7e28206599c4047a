"""Matrices transposed a square of vectors at a time, and what is left over at the edges."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import jvp, vmap

import topkast_func as tk
from tests.kernels.problems import DTYPES
from topkast_func.kernels.tiles import at_once, spelled_out
from topkast_func.kernels.transpose import transposed

SIDES = st.integers(0, 70)


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@given(st.integers(0, 3), SIDES, SIDES, st.sampled_from(DTYPES))
def test_any_shape(matrices: int, n: int, m: int, dtype: torch.dtype) -> None:
    x = torch.arange(matrices * n * m, dtype=dtype).view(matrices, n, m)
    found = transposed(x)
    assert found.is_contiguous()
    assert torch.equal(found, x.mT)


@pytest.mark.usefixtures("threads")
def test_threads_share_the_work() -> None:
    x = torch.randn(5, 130, 67)
    assert torch.equal(transposed(x), x.mT)
    assert torch.equal(transposed(x[:, ::2, 1:]), x[:, ::2, 1:].mT)


def test_it_is_differentiated_as_what_it_stands_for() -> None:
    x, v = torch.randn(2, 3, 5, 7, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(at_once, x.clone().requires_grad_())
    assert torch.equal(jvp(at_once, (x,), (v,))[1], v.mT)
    assert torch.equal(vmap(at_once, in_dims=1)(x[:, None]), spelled_out(x)[None])


def test_tokens_of_sequences_that_tiles_cut_anywhere_compile_as_they_run() -> None:
    """Sequences of 5 tokens in tiles of 128: what torch would spell out a number at a time."""
    model = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 3))
    config = tk.TopKastConfig(0.8, 0.5, refresh_every=2)
    batch, states = torch.randn(29, 5, 6), {}
    for compile in (False, True):
        state = tk.init_state(model, config, tk.sgd(0.1))
        step = tk.make_train_step(
            model,
            lambda apply, x: apply(x).square().mean(),
            config,
            tk.sgd(0.1),
            compile=compile,
            engine="numba",
        )
        for _ in range(3):
            state, metrics = step(state, batch)
        assert metrics.grad_norm > 0
        states[compile] = tk.dense_params(state)
    for name, theta in states[False].items():
        torch.testing.assert_close(states[True][name], theta)
