"""Matrices by columns: a count equals a sort."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from topkast_func.kernels import columns
from topkast_func.kernels.columns import by_columns


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(columns, "MANY", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_entries_come_column_by_column(
    counted: None, height: int, width: int, density: float, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density
    places = torch.from_numpy(np.flatnonzero(mask)).int()
    order, turned = by_columns(places, height, width)
    assert order.dtype == turned.dtype == torch.int32
    np.testing.assert_array_equal(turned, np.flatnonzero(mask.T))
    across, down = np.divmod(turned.numpy(), height)
    np.testing.assert_array_equal(places[order.long()], down * width + across)


def test_few_are_sorted_and_many_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(columns, "installed", lambda name: asked.append(name))
    for count in (columns.MANY - 1, columns.MANY):
        places = torch.arange(count, dtype=torch.int32)
        assert by_columns(places, count, 1)[1].equal(places)
    assert asked == ["numba"]
