"""Settings that every test runs under."""

from collections.abc import Iterator

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_figures() -> Iterator[None]:
    yield
    from matplotlib import pyplot

    pyplot.close("all")
