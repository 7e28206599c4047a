"""Data sets: Boston housing, the seed's synthetic regression, images and text."""

from topkast_func.data.boston import BostonHousing, boston_dataset
from topkast_func.data.characters import Characters, windows
from topkast_func.data.images import FASHION_MNIST, Images, fashion_mnist
from topkast_func.data.synthetic import SyntheticDataset

__all__ = [
    "FASHION_MNIST",
    "BostonHousing",
    "Characters",
    "Images",
    "SyntheticDataset",
    "boston_dataset",
    "fashion_mnist",
    "windows",
]
