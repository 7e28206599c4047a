"""Boston housing: 506 census tracts, 13 features, the median value of homes."""

import csv
from importlib.resources import files

import numpy as np
import torch
from torch.utils.data import TensorDataset


class BostonHousing(TensorDataset):
    """Boston housing as pairs (features, target).

    Harrison and Rubinfeld, "Hedonic housing prices and the demand for clean air", J. Environ.
    Economics and Management 5 (1978), 81-102; StatLib's copy, in the public domain. The
    column B encodes race, for which reason scikit-learn dropped the data: it is shipped for
    the examples that are defined on it; use other data wherever the choice is free.

    Args:
        standardize: Give each feature mean 0 and standard deviation 1 over the 506 rows; the
            target stays in thousands of dollars of 1970.

    Attributes:
        names: The features, in the order of the columns.
        features: float32, [506, 13].
        target: Median value of owner-occupied homes, thousands of dollars, float32, [506].

    Example:
        >>> features, target = BostonHousing()[0]
        >>> features.shape, float(target)
        (torch.Size([13]), 24.0)
    """

    def __init__(self, standardize: bool = False) -> None:
        table = files("topkast_func.data") / "boston_housing.csv"
        with table.open() as lines:
            *self.names, _ = next(csv.reader(lines))
            values = np.loadtxt(lines, delimiter=",")
        features, target = values[:, :-1], values[:, -1]
        if standardize:
            features = (features - features.mean(0)) / features.std(0)
        self.features = torch.from_numpy(features).float()
        self.target = torch.from_numpy(target).float()
        super().__init__(self.features, self.target)


boston_dataset = BostonHousing()
