"""Sparse matrices of small integers, on which every product is exact in every dtype."""

from typing import NamedTuple

import torch
from torch import Tensor

from tests import reference
from topkast_func.kernels import ENGINES, Pattern, pattern_of
from topkast_func.kernels.engines import engine, layout

BLOCKS = [(1, 1), (4, 1), (1, 4), (4, 4), (8, 8), (16, 16), (3, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
ON_CPU = tuple(name for name in ENGINES if name != "triton")
"""The engines that compute here; Triton's is in `interpreted`."""

BATCHES = [0, 1, 5, 128, 300]


class Problem(NamedTuple):
    """A matrix with its sets, and how compact storage holds it."""

    theta: Tensor
    forward: Tensor
    backward: Tensor
    block: tuple[int, int]
    order: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.theta.shape[0], self.theta.shape[1])

    @property
    def pattern(self) -> Pattern:
        return pattern_of(self.forward, self.backward, self.block)

    @property
    def alpha(self) -> Tensor:
        return self.theta * self.forward

    def gathered(self, matrix: Tensor) -> Tensor:
        """Take the entries of B out of a matrix, in the order of the values."""
        taken = matrix.flatten()[self.order]
        return taken.flatten() if self.block == (1, 1) else taken.view(-1, *self.block)

    def on(self, device: torch.device) -> "Problem":
        """Return the problem on another device."""
        theta, forward, backward, order = (
            tensor.to(device) for tensor in (self.theta, self.forward, self.backward, self.order)
        )
        return Problem(theta, forward, backward, self.block, order)

    @property
    def values(self) -> Tensor:
        return self.gathered(self.theta)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random integers from −4 to 4 without 0."""
    return (torch.randint(1, 5, shape) * (2 * torch.randint(0, 2, shape) - 1)).to(dtype)


def problem_of(
    active: Tensor, chosen: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Problem:
    """Return a problem from the sets over blocks."""
    forward, backward = (
        grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        for grid in (active, active | chosen)
    )
    theta = integers(*forward.shape, dtype=dtype)
    order = reference.stored_order(forward.numpy(), backward.numpy(), block)
    places = torch.tensor(order, dtype=torch.int64).view(-1, block[0] * block[1])
    return Problem(theta, forward, backward, block, places)


def problem(
    block: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
    grid: tuple[int, int] | None = None,
    densities: tuple[float, float] = (0.3, 0.6),
) -> Problem:
    """Return a random problem with an empty row, an empty column and all kinds of sets."""
    rows, columns = grid or (max(3, 40 // block[0]), max(4, 60 // block[1]))
    active, chosen = (torch.rand(rows, columns) < density for density in densities)
    if densities[0] < 1:
        for mask in (active, chosen):
            mask[1], mask[:, 2] = False, False
        active[0, 0], active[0, 1], chosen[0, 1] = True, False, True
    return problem_of(active, chosen, block, dtype)


def products(name: str, given: Problem, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the three products of an engine on [batch, features]."""
    run, (pack, unpack) = engine(name), layout(name)
    values, pattern, (rows, columns) = given.values, given.pattern, given.shape
    y = run.forward(values, pack(x), pattern, rows)
    for_x = run.input_gradient(values, pack(g), pattern, columns)
    for_values = run.weight_gradient(pack(g), pack(x), pattern, values)
    return unpack(y, len(x)), unpack(for_x, len(g)), for_values


def check_products(name: str, given: Problem, batch: int) -> None:
    """Compare the three products of an engine with the oracle, bit for bit."""
    rows, columns = given.shape
    x, g = (integers(batch, n, dtype=given.theta.dtype) for n in (columns, rows))
    found = products(name, given, x, g)
    theta, *activations = (t.double().numpy() for t in (given.theta, x, g))
    sets = (given.forward.numpy(), given.backward.numpy())
    oracle = reference.sparse_products(theta, *sets, *activations)
    y, for_x, for_theta = (torch.from_numpy(array) for array in oracle)
    expected = (y, for_x, given.gathered(for_theta))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == given.theta.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs.to(ours.dtype))
    check_unused(name, given, x, g, found[2])
    if batch and given.forward.any():
        assert y.any()
        assert for_x.any()


def check_unused(name: str, given: Problem, x: Tensor, g: Tensor, exact: Tensor) -> None:
    """Check that unused places change no product, and have a zero gradient."""
    run, (pack, _) = engine(name), layout(name)
    spare = 3
    places = given.pattern.exploring.columns.shape[0] + spare
    padded = pattern_of(given.forward, given.backward, given.block, places)
    values = torch.cat([given.values, given.values.new_full((spare, *given.values.shape[1:]), 9.0)])
    found = run.weight_gradient(pack(g), pack(x), padded, values)
    assert torch.equal(found[:-spare], exact)
    assert not found[-spare:].any()
    for product, of, features in (
        (run.forward, x, given.shape[0]),
        (run.input_gradient, g, given.shape[1]),
    ):
        expected = product(given.values, pack(of), given.pattern, features)
        assert torch.equal(product(values, pack(of), padded, features), expected)
