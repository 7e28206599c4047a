"""The seed's two-dimensional regression task."""

import torch
from torch.utils.data import TensorDataset

from topkast_func.checks import check_count


class SyntheticDataset(TensorDataset):
    """y = x + cos x + u, u uniform in [0, 1), with features (x, cos x), x = i/n in [0, 1).

    Args:
        n_obs: Number n of observations, at least 1.
        seed: Seed of the noise u, at least 0.

    Attributes:
        features: float32, [n_obs, 2].
        target: float32, [n_obs].

    Raises:
        TypeError: ``n_obs`` or ``seed`` is no integer.
        ValueError: ``n_obs`` is below 1, or ``seed`` below 0.

    Departures:
        The seed's code reshapes where it means to stack, so that its rows are pairs of
        neighbouring x, and draws its noise unseeded.

    Example:
        >>> features, target = SyntheticDataset(8)[:]
        >>> features.shape, target.shape
        (torch.Size([8, 2]), torch.Size([8]))
    """

    def __init__(self, n_obs: int, seed: int = 0) -> None:
        chance = torch.Generator("cpu").manual_seed(check_count("seed", seed, 0))
        size = check_count("n_obs", n_obs, 1)
        x = torch.arange(size, dtype=torch.float32, device="cpu") / n_obs
        noise = torch.rand(size, generator=chance, dtype=torch.float32, device="cpu")
        self.features = torch.stack((x, x.cos()), 1)
        self.target = self.features.sum(1) + noise
        super().__init__(self.features, self.target)
