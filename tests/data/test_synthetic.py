"""The synthetic regression: its formula, its seed, its errors."""

import math
import re
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import Dataset

from topkast_func.data import SyntheticDataset


@pytest.mark.parametrize("n_obs", [1, 2, 7, 1000])
def test_shapes_and_dtypes(n_obs: int) -> None:
    data = SyntheticDataset(n_obs)
    assert isinstance(data, Dataset)
    assert len(data) == n_obs
    assert (data.features.shape, data.features.dtype) == ((n_obs, 2), torch.float32)
    assert (data.target.shape, data.target.dtype) == ((n_obs,), torch.float32)


def test_features_are_x_and_its_cosine() -> None:
    """The points are i/n, as the docstring says."""
    expected = [[i / 10, math.cos(i / 10)] for i in range(10)]
    assert_close(SyntheticDataset(10).features, torch.tensor(expected))


def test_the_target_is_x_plus_its_cosine_plus_uniform_noise() -> None:
    data = SyntheticDataset(4000)
    x = torch.arange(4000).double() / 4000
    noise = data.target.double() - x - x.cos()
    assert float(noise.min()) >= -1e-6
    assert float(noise.max()) < 1.0 + 1e-6
    shares = noise.histc(4, 0.0, 1.0) / 4000
    five_deviations = 5.0 * math.sqrt(0.25 * 0.75 / 4000)
    assert float((shares - 0.25).abs().max()) < five_deviations
    assert abs(float(torch.corrcoef(torch.stack((x, noise)))[0, 1])) < 5.0 / math.sqrt(4000)


def test_the_same_seed_gives_the_same_data_and_another_seed_other_noise() -> None:
    first, again, other = SyntheticDataset(50), SyntheticDataset(50), SyntheticDataset(50, seed=1)
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.features, other.features)
    assert not torch.equal(first.target, other.target)
    assert torch.equal(other.target, SyntheticDataset(50, 1).target)


def test_the_noise_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), SyntheticDataset(50)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(SyntheticDataset(50).target, first.target)


@pytest.mark.parametrize("index", [0, -1, [3, 1], slice(2, 9, 3), torch.tensor([5, 0])], ids=str)
def test_indexing_gives_features_and_target(index: Any) -> None:
    data = SyntheticDataset(10)
    features, target = data[index]
    assert torch.equal(features, data.features[index])
    assert torch.equal(target, data.target[index])


@pytest.mark.parametrize("n_obs", [0, -3])
def test_too_few_observations_are_refused(n_obs: int) -> None:
    with pytest.raises(ValueError, match=f"n_obs must be at least 1, got {n_obs}"):
        SyntheticDataset(n_obs)


@pytest.mark.parametrize("n_obs", [2.0, True, "3", None, math.nan])
def test_a_number_of_observations_that_is_no_integer_is_refused(n_obs: Any) -> None:
    message = f"n_obs must be an integer of at least 1, got {n_obs!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        SyntheticDataset(n_obs)
