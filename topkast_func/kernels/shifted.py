"""Images as rows that the taps of a kernel read from shifted places: nothing is unfolded.

A tile holds a few images, one below the other, a row for every channel; where a convolution has
strides, for every phase of one (the pixels whose places have the same remainders), so that a tap
reads pixels side by side. A tap at (y, x) reads a row from y·w + x on, w pixels being the width
of an image and of the zeros left of it; these serve as those right of the line above as well, and
those above an image as those below the one before it.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from topkast_func.kernels.dense import Flat
from topkast_func.kernels.pattern import INDEX_LIMIT, BlockRows, Pattern, nested
from topkast_func.kernels.tiles import VECTOR_BYTES

Pair: TypeAlias = tuple[int, int]

TILE = 256
"""Pixels, and zeros between them, that the images of a tile have together where they are small."""


class Convolution(NamedTuple):
    """What a convolution is beside its weight, along rows and columns of images.

    Attributes:
        kernel: Taps.
        stride: Pixels from one output to the next.
        padding: Zeros on each side.
        dilation: Pixels from one tap to the next.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def reach(self) -> Pair:
        """Pixels from the first tap to the last."""
        rows, columns = zip(self.kernel, self.dilation, strict=True)
        return (rows[0] - 1) * rows[1], (columns[0] - 1) * columns[1]


class Shifted(NamedTuple):
    """The sets of a kernel, and where what its entries multiply lies in the rows of a tile.

    Attributes:
        pattern: The sets, of the matrix [out, channels·taps].
        starts: Where each tap of each channel begins to read in a tile, [channels, taps], int32.
        lead: Where the outputs begin in their rows; before it they are undefined, their
            gradients zero.
    """

    pattern: Pattern
    starts: Tensor
    lead: int


class Planes(NamedTuple):
    """How the images of a batch lie in tiles.

    Attributes:
        layer: The convolution.
        batch: Images.
        size: Height and width of an image.
        images: Of a tile.
        lines: Height and width of an image and its zeros, in strides.
        lead: Most that a tap shifts by, a multiple of a vector.
        length: Numbers of a row, ``lead`` of them beyond the images.
    """

    layer: Convolution
    batch: int
    size: Pair
    images: int
    lines: Pair
    lead: int
    length: int

    def pack(self, x: Tensor) -> Tensor:
        """Cut images [batch, channels, height, width] into tiles [tiles, rows, length]."""
        (top, left), (down, across) = self.layer.padding, self.layer.stride
        height, width = self.lines
        bottom, right = height * down - top - self.size[0], width * across - left - self.size[1]
        tiles = -(-self.batch // self.images)
        missing = tiles * self.images - self.batch
        x = functional.pad(x, (left, right, top, bottom, 0, 0, 0, missing))
        x = x.reshape(tiles, self.images, -1, height, down, width, across)
        x = x.permute(0, 2, 4, 6, 1, 3, 5).reshape(tiles, -1, self.images * height * width)
        return functional.pad(x, (0, self.length - x.shape[2]))

    def unpack(self, y: Tensor) -> Tensor:
        """Return outputs in tiles [tiles, out, length] as images, contiguous."""
        height, width = self.lines
        y = y[:, :, self.lead : self.lead + self.images * height * width]
        y = y.reshape(y.shape[0], -1, self.images, height, width).transpose(1, 2).flatten(0, 1)
        rows, columns = self.outputs
        return y[: self.batch, :, :rows, :columns].contiguous()

    @property
    def outputs(self) -> Pair:
        """Height and width of an image of outputs."""
        layer = self.layer
        sides = zip(self.size, layer.padding, layer.reach, layer.stride, strict=True)
        rows, columns = ((n + 2 * pad - reach - 1) // step + 1 for n, pad, reach, step in sides)
        return rows, columns

    def starts(self, channels: int, device: torch.device) -> Tensor:
        """Return where each tap of each channel begins to read; see `Shifted`."""
        (down, across), (y, x) = self.layer.stride, self.layer.dilation
        taps = [(i * y, j * x) for i, j in product(*map(range, self.layer.kernel))]
        rows = [(i % down) * across + j % across for i, j in taps]
        begins = [i // down * self.lines[1] + j // across for i, j in taps]
        within = [row * self.length + begin for row, begin in zip(rows, begins, strict=True)]
        channel = torch.arange(channels, device=device)[:, None] * (down * across * self.length)
        return (channel + torch.tensor(within, device=device)).int()


def planes(x: Tensor, layer: Convolution) -> Planes | None:
    """Lay out images [batch, channels, height, width].

    Args:
        x: The images.
        layer: The convolution; its padding is at most its reach.

    Returns:
        The layout; None where there is nothing to compute, or more than int32 can count.
    """
    batch, channels, *size = map(int, x.shape)
    sides = zip(size, layer.padding, layer.stride, strict=True)
    height, width = (-(-(n + pad) // step) for n, pad, step in sides)
    images = max(1, min(batch, round(TILE / max(1, height * width))))
    lanes = VECTOR_BYTES // x.element_size()
    shifts = [reach // step for reach, step in zip(layer.reach, layer.stride, strict=True)]
    lead = _rounded(shifts[0] * width + shifts[1], lanes)
    length = _rounded(images * height * width, lanes) + lead
    found = Planes(layer, batch, (size[0], size[1]), images, (height, width), lead, length)
    counted = channels * math.prod(layer.stride) * length <= INDEX_LIMIT
    return found if counted and batch and min(*found.outputs) > 0 else None


def _rounded(number: int, step: int) -> int:
    """Return the least multiple of a step that is not below a number."""
    return -(-number // step) * step


def index_of(tensors: Sequence[Tensor], lead: int) -> Pattern | Flat | Shifted:
    """Return the sets of a weight from their tensors, the taps of a kernel last."""
    if len(tensors) == 3:
        return Flat(tensors[0], BlockRows(*tensors[1:]))
    pattern, starts = nested(tensors[:7]), tensors[7:]
    return Shifted(pattern, starts[0], lead) if starts else pattern


def multiplied(w: Tensor, x: Tensor, sets: Pattern | Flat | Shifted) -> Tensor:
    """Return w·x of activations, whose second axis are features or rows of a tile."""
    if not isinstance(sets, Shifted):
        return torch.einsum("oi,ni...->no...", w, x)
    unfolded = x.flatten(1)[:, _places(x, sets)]
    return functional.pad(torch.einsum("oi,nip->nop", w, unfolded), (sets.lead, 0))


def transposed_multiplied(
    w: Tensor, g: Tensor, sets: Pattern | Flat | Shifted, rows: int
) -> Tensor:
    """Return wᵀ·g of gradients of so many features or rows; the transpose of `multiplied`."""
    if not isinstance(sets, Shifted):
        return torch.einsum("oi,no...->ni...", w, g)
    unfolded = torch.einsum("oi,nop->nip", w, g[:, :, sets.lead :])
    x = g.new_zeros(g.shape[0], rows * g.shape[2])
    x = x.index_add(1, _places(g, sets).flatten(), unfolded.flatten(1))
    return x.view(g.shape[0], rows, g.shape[2])


def _places(tile: Tensor, sets: Shifted) -> Tensor:
    """Return what each tap of each channel reads of a tile, [channels·taps, outputs]."""
    outputs = torch.arange(tile.shape[2] - sets.lead, device=tile.device)
    return sets.starts.flatten()[:, None] + outputs
