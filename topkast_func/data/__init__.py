"""Data sets: Boston housing, and the seed's synthetic regression."""

from topkast_func.data.boston import BostonHousing, boston_dataset
from topkast_func.data.synthetic import SyntheticDataset

__all__ = ["BostonHousing", "SyntheticDataset", "boston_dataset"]
