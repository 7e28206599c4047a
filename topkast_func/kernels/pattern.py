"""Patterns: where the stored values of a sparse weight stand, row-compressed."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from topkast_func.kernels.columns import by_columns
from topkast_func.kernels.library import define
from topkast_func.places import PIECE, places_apart, repeated

INDEX_LIMIT = 2**31 - 1
"""Most entries that int32 indices can count."""

SEGMENT = 16
"""Stored blocks that one block row should have in a panel, so that its loop pays."""

PANEL = (128, 1024)
"""Fewest and most features of a panel: what fits the caches beside a tile."""


class BlockRows(NamedTuple):
    """Block rows of stored blocks, cut into panels of columns.

    Attributes:
        pointers: [rows·panels + 1], int32: where the blocks of each row and panel start, rows
            outermost; the last is how many are stored.
        columns: [blocks], int32: block column of each, ascending within a row. Places beyond
            the last pointer are unused.
    """

    pointers: Tensor
    columns: Tensor


class Pattern(NamedTuple):
    """The two disjoint sets of a matrix, over blocks, and A once more by columns.

    The values of A come first, then those of B∖A, each in row-major order of blocks.

    Attributes:
        forward: A.
        exploring: B∖A.
        transposed: A by block columns: ``columns`` then holds block rows.
        places: [blocks of A], int32: which value each block of ``transposed`` is.
    """

    forward: BlockRows
    exploring: BlockRows
    transposed: BlockRows
    places: Tensor

    @property
    def active_count(self) -> int:
        """How many of the values, or blocks of them, are those of A; they come first."""
        return self.places.shape[0]

    @property
    def exploring_count(self) -> int:
        """How many places B∖A has, unused ones included."""
        return self.exploring.columns.shape[0]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What `flat_index` follows from."""
        return (*self.forward, *self.exploring)

    def flat_index(self, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
        """Return where the values stand in the flat θ.

        Args:
            block: (r, c) of a block.
            shape: Of θ; axes after the first are taken as one.

        Returns:
            int64, in the shape of the values; the number of entries of θ where a place is unused.
        """
        return flat_index(self.parts, block, shape)


def pattern_of(
    forward: Tensor,
    backward: Tensor,
    block_shape: tuple[int, int] = (1, 1),
    exploring: int | None = None,
    sizes: tuple[int, int] | None = None,
) -> Pattern:
    """Index the sets of a matrix or a kernel, on its device, in time proportional to its size.

    Args:
        forward: 1_A, bool, [rows, columns], whole blocks; more axes are taken as one.
        backward: 1_B, the same; contains A.
        block_shape: (r, c) of a block.
        exploring: Places to keep for B∖A at the least; None for as many as it has blocks.
        sizes: |A| and |B|, entries; None to count them, for which the host waits.

    Returns:
        The pattern, on the device of the masks.

    Raises:
        ValueError: There are more blocks than int32 can count.
    """
    rows, columns = block_shape
    forward, backward = forward.flatten(1), backward.flatten(1)
    active, chosen = forward[::rows, ::columns], backward[::rows, ::columns]
    if active.numel() > INDEX_LIMIT:
        raise ValueError(
            f"a matrix of shape {tuple(forward.shape)} has {active.numel()} blocks of "
            f"{block_shape}; patterns count up to {INDEX_LIMIT}: use larger blocks or split the "
            "layer"
        )
    height, width = active.shape
    size = rows * columns
    units = sizes and (sizes[0] // size, sizes[1] // size)
    stored, others = places_apart(active, chosen, exploring, units, torch.int32)
    order, turned = by_columns(stored, height, width)
    return Pattern(
        _block_rows(stored, (height, width), size, columns),
        _block_rows(others, (height, width), size, columns),
        _block_rows(turned, (width, height), size, rows),
        order,
    )


def is_indexed(shape: Sequence[int], block: tuple[int, int]) -> bool:
    """Return whether patterns hold the sets of a weight of such blocks: kernels, entries alone."""
    return len(shape) == 2 or block == (1, 1)


def flattened(pattern: Pattern) -> tuple[Tensor, ...]:
    """Return the tensors of a pattern, in order; inverse of `nested`."""
    forward, exploring, transposed, places = pattern
    return (*forward, *exploring, *transposed, places)


def nested(tensors: Sequence[Tensor]) -> Pattern:
    """Return the pattern of its tensors."""
    forward, exploring, transposed = (BlockRows(*tensors[i : i + 2]) for i in (0, 2, 4))
    return Pattern(forward, exploring, transposed, tensors[6])


def flat(
    part: BlockRows, block: tuple[int, int], shape: tuple[int, int], narrow: bool = False
) -> Tensor:
    """Return where the entries of the stored blocks stand in the flat matrix.

    Args:
        part: The stored blocks.
        block: (r, c) of a block.
        shape: Rows and columns of the matrix.
        narrow: Whether to count in int32 where that reaches; on a device bytes are time.

    Returns:
        int64, or int32, [blocks] or, but for blocks of one entry, [blocks, r, c]; the number of
        entries of the matrix where a place is unused.
    """
    rows, (height, width) = shape[0] // block[0], block
    narrow = narrow and (shape[0] + height) * shape[1] <= INDEX_LIMIT
    panels, places = (part.pointers.shape[0] - 1) // rows, part.columns.shape[0]
    ends = torch.cat((part.pointers[::panels], part.pointers.new_full((1,), places)))
    row = repeated(ends.diff(), places)
    column = part.columns if narrow else part.columns.long()
    corner = torch.add(column if width == 1 else column * width, row, alpha=height * shape[1])
    if block != (1, 1):
        down, across = (torch.arange(n, dtype=corner.dtype, device=row.device) for n in block)
        corner = corner[:, None, None] + (down[:, None] * shape[1] + across)
    return corner.clamp_(max=shape[0] * shape[1])  # what is unused is in the row after the last


def flat_in_bands(
    part: BlockRows, block: tuple[int, int], shape: tuple[int, int]
) -> Iterator[Tensor]:
    """Return what `flat` does, a band of block rows at a time; the host waits for the pointers."""
    rows, count, area = shape[0] // block[0], len(part.columns), block[0] * block[1]
    panels, height = (len(part.pointers) - 1) // rows, max(1, rows * PIECE // (count * area or 1))
    ends = [*part.pointers[:-1:panels].cpu().tolist(), count]
    for top in range(0, rows, height):
        end = min(top + height, rows)
        pointers = part.pointers[top * panels : end * panels + 1] - ends[top]
        band = BlockRows(pointers, part.columns[ends[top] : ends[end]])
        places = flat(band, block, ((end - top) * block[0], shape[1]))
        yield places.add_(top * block[0] * shape[1])


def flat_index(parts: Sequence[Tensor], block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Return what `Pattern.flat_index` does, of the ``parts`` of a pattern."""
    result: Tensor = _FLAT_INDEX(parts, block, (shape[0], math.prod(shape[1:])))
    return result


def _flat_index(parts: list[Tensor], block: list[int], shape: list[int]) -> Tensor:
    (rows, columns), (height, width) = shape, block
    found = _like_flat_index(parts, block, shape)
    counts = [parts[1].shape[0], parts[3].shape[0]]
    for part, places in zip((parts[:2], parts[2:]), found.split(counts), strict=True):
        places.copy_(flat(BlockRows(*part), (height, width), (rows, columns), narrow=True))
    return found


def _like_flat_index(parts: list[Tensor], block: list[int], shape: list[int]) -> Tensor:
    count = parts[1].shape[0] + parts[3].shape[0]
    sides = [] if block == [1, 1] else block
    return parts[0].new_empty((count, *sides), dtype=torch.int64)


_FLAT_INDEX = define(
    "flat_index(Tensor[] parts, int[] block, int[] shape) -> Tensor", _flat_index, _like_flat_index
)


def places_in(pattern: Pattern, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Return `Pattern.flat_index` for `gathered`, all places in use: in int32 where that counts."""
    places = pattern.flat_index(block, shape)
    return places.int() if math.prod(shape) <= INDEX_LIMIT else places


def block_of(values: Tensor) -> tuple[int, int]:
    """Return the block shape of values, [|B|] or [blocks, r, c]."""
    return (values.shape[1], values.shape[2]) if values.ndim == 3 else (1, 1)


def _block_rows(places: Tensor, shape: tuple[int, int], size: int, width: int) -> BlockRows:
    """Compress rows of blocks of ``size`` entries at ascending places, which become columns."""
    rows, columns = shape
    density = places.shape[0] / (rows * columns)
    panels = _panels(columns, width, SEGMENT * size / max(density, 1e-9))
    row, panel = (torch.arange(n, device=places.device) for n in (rows + 1, panels))
    starts = row[:, None] * columns + (panel * columns + panels - 1) // panels
    firsts = starts.flatten()[: rows * panels + 1].to(places.dtype)
    return BlockRows(torch.searchsorted(places, firsts, out_int32=True), places.remainder_(columns))


def _panels(columns: int, width: int, features: float) -> int:
    """Return into how many panels of about ``features`` features to cut the columns."""
    least, most = PANEL
    return max(1, round(columns * width / min(max(features, least), most)))
