"""Activations as tiles of the batch, features outermost within a tile."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from topkast_func.kernels.library import Gradient, define

VECTOR_BYTES = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
"""Bytes of a vector: what one register holds, or two of the narrow kind."""

TILE_BYTES = 512
"""Most bytes of a row of a tile: eight vectors of the widest kind."""


Turn: TypeAlias = Callable[[Tensor], Tensor]
"""Transposes matrices: [matrices, n, m] to [matrices, m, n], contiguous."""


def at_once(matrices: Tensor) -> Tensor:
    """Return matrices transposed by a kernel, which torch.compile leaves as it is."""
    turned: Tensor = TRANSPOSED(matrices)
    return turned


def spelled_out(matrices: Tensor) -> Tensor:
    """Return matrices transposed in torch, which torch.compile puts into what is around it.

    That spares passes over memory where what is around has the axes of the tiles; where it has
    others, it is computed a number at a time.
    """
    return matrices.transpose(1, 2).contiguous()


def pack(x: Tensor, turn: Turn = at_once) -> Tensor:
    """Cut a batch into tiles of equal width, a multiple of a vector.

    Args:
        x: [batch, features].
        turn: How tiles are transposed.

    Returns:
        [tiles, features, width], padded with zeros.
    """
    batch, features = x.shape
    size = x.element_size()
    tiles = max(1, -(-batch * size // TILE_BYTES))
    lanes = VECTOR_BYTES // size
    width = max(1, -(-batch // (tiles * lanes))) * lanes
    if missing := tiles * width - batch:
        x = functional.pad(x, (0, 0, 0, missing))
    return turn(x.reshape(tiles, width, features))


def unpack(tiles: Tensor, batch: int, turn: Turn = at_once) -> Tensor:
    """Return tiles as a batch; inverse of `pack`.

    Args:
        tiles: [tiles, features, width].
        batch: Rows there were.
        turn: How they are transposed.

    Returns:
        [batch, features], contiguous: random numbers, of dropout for one, are drawn in the order
        of memory.
    """
    rows = turn(tiles).flatten(0, 1)
    return rows if rows.shape[0] == batch else rows[:batch]


class _Transposed(Gradient):
    """It is linear, and its own gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, TRANSPOSED(g)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        moved: Tensor = TRANSPOSED(tangents[1])
        return moved


def _transposed(x: Tensor) -> Tensor:
    from topkast_func.kernels.transpose import transposed  # LLVM is there, or no tiles are

    return transposed(x.detach())


def _like_transposed(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1])


def _folded(operator: Any, info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
    """Batch it in one call."""
    y = operator(x.movedim(in_dims[0], 0).flatten(0, 1))
    return y.unflatten(0, (info.batch_size, -1)), 0


TRANSPOSED = define(
    "transposed(Tensor x) -> Tensor", _transposed, _like_transposed, _Transposed, _folded
)
