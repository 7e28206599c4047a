"""Boston housing: the file, the numbers, the indexing."""

import csv
import hashlib
from importlib.resources import files

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from topkast_func.data import BostonHousing, boston_dataset

SHA256 = "04ea3ed0aa63691cfedf388349eafc1213e91e00f8e4d31747534692c0f1ce02"
NAMES = ["CRIM", "ZN", "INDUS", "CHAS", "NOX", "RM", "AGE", "DIS", "RAD", "TAX", "PTRATIO"]
NAMES += ["B", "LSTAT"]


def _table() -> list[list[str]]:
    file = files("topkast_func.data") / "boston_housing.csv"
    return list(csv.reader(file.read_text().splitlines()))


def test_the_file_in_the_package_is_the_published_one() -> None:
    content = (files("topkast_func.data") / "boston_housing.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256


def test_the_numbers_are_those_of_the_file() -> None:
    header, *rows = _table()
    data = BostonHousing()
    expected = torch.tensor([[float(cell) for cell in row] for row in rows])
    assert data.names == header[:-1] == NAMES
    assert header[-1] == "MEDV"
    assert torch.equal(data.features, expected[:, :-1])
    assert torch.equal(data.target, expected[:, -1])


@pytest.mark.parametrize("standardize", [False, True])
def test_shapes_and_dtypes(standardize: bool) -> None:
    data = BostonHousing(standardize=standardize)
    assert isinstance(data, Dataset)
    assert len(data) == 506
    assert (data.features.shape, data.features.dtype) == ((506, 13), torch.float32)
    assert (data.target.shape, data.target.dtype) == ((506,), torch.float32)


def test_moments_of_the_target() -> None:
    target = BostonHousing().target.double()
    assert round(float(target.var(correction=0)), 2) == 84.42
    assert round(float(target.mean()), 2) == 22.53


def test_standardized_features_have_mean_0_and_standard_deviation_1() -> None:
    raw, data = BostonHousing(), BostonHousing(standardize=True)
    deviation, mean = torch.std_mean(data.features.double(), 0, correction=0)
    assert_close(mean, torch.zeros(13).double(), atol=1e-6, rtol=0)
    assert_close(deviation, torch.ones(13).double(), atol=1e-6, rtol=0)
    assert torch.equal(data.target, raw.target)
    features = raw.features.double()
    assert_close(
        data.features.double(),
        (features - features.mean(0)) / features.std(0, correction=0),
        atol=1e-5,
        rtol=1e-5,
    )


def test_boston_dataset_has_raw_features() -> None:
    assert isinstance(boston_dataset, BostonHousing)
    assert torch.equal(boston_dataset.features, BostonHousing().features)
    assert torch.equal(boston_dataset.target, BostonHousing().target)


@pytest.mark.parametrize(
    "index",
    [0, -1, 505, [3, 1, 4], slice(2, 9, 3), torch.tensor([5, 0]), torch.arange(506) % 2 == 0],
    ids=str,
)
def test_indexing_gives_features_and_target(
    index: int | list[int] | slice | torch.Tensor,
) -> None:
    data = BostonHousing(standardize=True)
    features, target = data[index]
    assert torch.equal(features, data.features[index])
    assert torch.equal(target, data.target[index])
    assert features.shape == (*target.shape, 13)


def test_an_index_out_of_range_is_an_error() -> None:
    with pytest.raises(IndexError):
        BostonHousing()[506]


def test_batches_come_out_of_a_loader() -> None:
    data = BostonHousing()
    batches = list(DataLoader(data, batch_size=100))
    assert [len(target) for _, target in batches] == [100] * 5 + [6]
    assert torch.equal(torch.cat([features for features, _ in batches]), data.features)


def test_two_instances_share_no_memory() -> None:
    first, second = BostonHousing(), BostonHousing()
    first.features.zero_()
    assert second.features.count_nonzero() > 0
