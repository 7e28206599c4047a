"""How the sets of one weight are chosen, and who computes with it."""

from math import prod
from typing import NamedTuple

from torch import Tensor

from topkast_func.config import TopKastConfig
from topkast_func.kernels.costs import Layer, channels_of
from topkast_func.kernels.engines import ALPHA, Choice, EngineName, choose
from topkast_func.report.notes import UNKNOWN
from topkast_func.sparsity import Allocation

BATCH, PIXELS = 256, 8192
"""Rows of activations, and pixels of images, for which it is decided whether kernels compute."""


class Rule(NamedTuple):
    """How the sets of a weight are chosen; it goes along with copies of the layer.

    Attributes:
        name: Name of the weight in the model.
        shape: Its shape.
        config: The configuration; which parameters it selects is not read.
        allocation: The sparsities in force.
        counts: |A| and |B| of every stage of the configuration.
        step: Number of the step that comes next.
        seed: Seed of the methods that draw.
        matrix: Whether it is a weight that kernels can compute with.
        engine: The engine that is asked for.
        mark: That of the sparsifier that chooses its sets.
    """

    name: str
    shape: tuple[int, ...]
    config: TopKastConfig
    allocation: Allocation
    counts: frozenset[tuple[int, int]]
    step: int = 0
    seed: int = 0
    matrix: bool = False
    engine: EngineName = "auto"
    mark: str = ""

    def choice(self, theta: Tensor, forward: int, backward: int) -> Choice:
        """Return who computes with the weight, and why.

        Args:
            theta: θ, of which shape, dtype and device are read.
            forward: Entries in A.
            backward: Entries in B.

        Returns:
            The choice.

        Raises:
            ImportError: The engine asked for is not installed.
            TypeError: The engine asked for does not support the dtype or device.
        """
        if not self.matrix:
            return Choice("dense", ALPHA + UNKNOWN)
        matrix, channels = (theta.shape[0], prod(theta.shape[1:])), channels_of(theta.shape)
        block, (device, index) = self.config.block_shape, (theta.device.type, theta.device.index)
        sizes = *matrix, forward, backward, block, PIXELS if channels else BATCH
        return choose(self.engine, Layer(*sizes, theta.dtype, device, channels, index))
