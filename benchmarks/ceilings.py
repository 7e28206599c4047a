"""What bounds an unstructured product: its inner loop by itself, and other sizes of its tiles.

With every operand in the first-level cache the loop runs as fast as this processor lets it;
a product, whose operands come from farther away, can only be slower.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from benchmarks import products
from benchmarks.multiplication import FORWARD, OURS, WEIGHT_GRADIENT
from benchmarks.protocol import Arm, Case, Parameters, Task
from topkast_func.kernels import pattern, tiles
from topkast_func.kernels.simd import add_dots, add_rows

ROWS, FEATURES, WIDTH, TIMES = 16, 32, 128, 1000
"""Rows and columns of a weight and numbers in a row of a tile, 24 kB together; and how often."""

STORED = (16, 32)
"""Entries in each row of that weight: what a row has in a panel of a product, and all."""

SHAPES, SPARSITIES = ((1024, 256), (2048, 512)), (0.8, 0.9)

SIZES = {"tile_bytes": (128, 256, 1024), "segment": (8, 32), "panel": (64, 256)}
"""What the bytes of a tile's row, the entries that a row should have in a panel, and the fewest
features of a panel are changed to, one of them at a time."""


def cases(full: bool) -> list[Case]:
    """Return the inner loop, and the products with other sizes.

    Args:
        full: The products as well.

    Returns:
        The cases.
    """
    loops = tuple(Arm(f"{stored} of {FEATURES}", {"stored": stored}) for stored in STORED)
    sized = [Case(f"{side}x{side}/{batch}", tuple(_sized(side, batch))) for side, batch in SHAPES]
    return [Case("first-level cache, one thread", loops), *(sized if full else [])]


def _sized(side: int, batch: int) -> Iterator[Arm]:
    common = {"way": OURS, "block_shape": (1, 1), "engine": "numba"}
    parameters = {**common, "side": side, "batch": batch, "sparsities": SPARSITIES}
    yield Arm("as it is", parameters)
    for name, changed in SIZES.items():
        for size in changed:
            yield Arm(f"{name} {size}", {**parameters, name: size})


def prepare(parameters: Parameters) -> list[Task]:
    """Prepare the inner loops, or the products with a size of this arm.

    Args:
        parameters: Of the arm.

    Returns:
        The tasks.
    """
    if "stored" in parameters:
        return [_forward(parameters["stored"]), _weight_gradient(parameters["stored"])]
    tiles.TILE_BYTES = parameters.get("tile_bytes", tiles.TILE_BYTES)
    pattern.SEGMENT = parameters.get("segment", pattern.SEGMENT)
    fewest, most = pattern.PANEL
    pattern.PANEL = parameters.get("panel", fewest), most
    return products.prepare(parameters)


class _Operands(NamedTuple):
    """A small weight, [ROWS, FEATURES], and what it is multiplied with.

    Attributes:
        column: Where its values stand, [ROWS, stored].
        values: [ROWS, stored].
        x: Inputs, [FEATURES, WIDTH].
        g: Gradient of the outputs, [ROWS, WIDTH].
    """

    column: Tensor
    values: Tensor
    x: Tensor
    g: Tensor


def _operands(stored: int) -> _Operands:
    torch.manual_seed(0)
    column = torch.rand(ROWS, FEATURES).argsort(1)[:, :stored].sort(1).values
    shapes = (ROWS, stored), (FEATURES, WIDTH), (ROWS, WIDTH)
    return _Operands(column, *(torch.randn(shape) for shape in shapes))


def _forward(stored: int) -> Task:
    o = _operands(stored)
    w = torch.zeros(ROWS, FEATURES).scatter_(1, o.column, o.values)
    return _task(FORWARD, _rows, (o.column.int(), o.values, o.x), w @ o.x)


def _weight_gradient(stored: int) -> Task:
    o = _operands(stored)
    sampled = (o.g @ o.x.t()).gather(1, o.column)
    return _task(WEIGHT_GRADIENT, _dots, (o.column.int(), o.g, o.x), sampled)


def _task(name: str, loop: Any, operands: tuple[Tensor, ...], expected: Tensor) -> Task:
    arrays = [tensor.numpy() for tensor in (*operands, torch.empty_like(expected))]

    def check(found: Any) -> None:
        products.check_close(torch.from_numpy(found) / TIMES, expected)

    told = {"multiplications": operands[0].numel() * WIDTH * TIMES}
    return Task(name, partial(loop, *arrays), check, told)


@njit
def _rows(column: Any, values: Any, x: Any, y: Any) -> Any:
    """Multiply TIMES times, adding to outputs that start at 0."""
    y[:] = 0
    rows, stored = column.shape
    width = x.shape[1]
    for _ in range(TIMES):
        for row in range(rows):
            add_rows(
                x,
                y.ctypes.data + row * width * x.itemsize,
                x.ctypes.data,
                width,
                column.ctypes.data,
                values.ctypes.data,
                0,
                row * stored,
                (row + 1) * stored,
                1,
                1,
                0,
            )
    return y


@njit
def _dots(column: Any, g: Any, x: Any, gradient: Any) -> Any:
    """Sample the product of the gradient TIMES times, adding to sums that start at 0."""
    gradient[:] = 0
    rows, stored = column.shape
    width = x.shape[1]
    for _ in range(TIMES):
        for row in range(rows):
            add_dots(
                x,
                gradient.ctypes.data,
                g.ctypes.data + row * width * x.itemsize,
                x.ctypes.data,
                width,
                column.ctypes.data,
                row * stored,
                (row + 1) * stored,
                1,
                1,
            )
    return gradient
