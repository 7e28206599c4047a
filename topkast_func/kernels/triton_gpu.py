"""Sparse products on a GPU in Triton, for blocks whose sides are multiples of 16.

A program computes one tile of the output in float32 and walks the stored blocks that it needs:
those of a block row of A for the products, the batch for the gradient of one stored block. Blocks
are cut into tiles of powers of two. Nothing is added by two programs, so that results are the same
at every call.

A bias is added to the sums before they are rounded. A kernel of its own reads and writes every
output: 4 bytes of each in half precision, at 4096² and 8192 tokens 134 MB, which is 40 µs of an
H100 where the product of blocks of 64 at 90 % takes 90 (projected). An activation is left to
`torch.compile`, which makes one kernel of it and of what else is done with each output. Its
gradient needs the outputs as they were, which had to be written all the same: it would save reading
them, 2 bytes, and take a kernel for each activation.
"""

import os
from inspect import signature
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkast_func.kernels.pattern import BlockRows, Pattern, block_of

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_ROWS = [(128, 4, 3), (64, 4, 4), (128, 8, 3), (64, 4, 2)]
"""Rows of activations in a tile, warps, and stages of the pipeline; the last fits any GPU.

All add in one order, as do `_DOTS`, and by one instruction, which on Hopper takes 64 rows and four
warps: the bits do not depend on which is the fastest.
"""

_DOTS = [(4, 3), (8, 3), (4, 4), (4, 2)]
"""Warps and stages of a sum over the batch."""


def forward(
    values: Tensor, x: Tensor, pattern: Pattern, features: int, bias: Tensor | None = None
) -> Tensor:
    """Return x·W_Aᵀ + b of activations [batch, in]."""
    height, depth = block_of(values)
    return _sums(values, x, pattern.forward, features, None, bias, (height, depth), (depth, 1))


def input_gradient(
    values: Tensor, g: Tensor, pattern: Pattern, features: int, bias: Tensor | None = None
) -> Tensor:
    """Return g·W_A + b of gradients [batch, out]."""
    depth, height = block_of(values)
    turned, places = pattern.transposed, pattern.places
    return _sums(values, g, turned, features, places, bias, (height, depth), (1, height))


def weight_gradient(g: Tensor, x: Tensor, pattern: Pattern, values: Tensor) -> Tensor:
    """Return gᵀ·x sampled on B, in the order and shape of ``values``."""
    gradient = torch.empty_like(values, memory_format=torch.contiguous_format)
    g, x = g.contiguous(), x.contiguous()
    height, width = block_of(values)
    rows, tile = g.shape[1] // height, (_tile(height, 128), _tile(width, 128))
    step = 128 // g.element_size()
    tiles = (height // tile[0]) * (width // tile[1])
    parts = (pattern.forward, pattern.exploring)
    found = torch.split(gradient, [part.columns.shape[0] for part in parts])
    with torch.cuda.device_of(g):
        for part, out in zip(parts, found, strict=True):
            if out.shape[0]:
                _dots[out.shape[0] * tiles,](
                    *(g, x, out, *part, g.shape[0], _size(g), g.shape[1], x.shape[1]),
                    *(rows, (part.pointers.shape[0] - 1) // rows, rows.bit_length()),
                    *(height, width, *tile, _precision(g), step),
                )
    return gradient


def _sums(
    values: Tensor,
    x: Tensor,
    part: BlockRows,
    features: int,
    places: Tensor | None,
    bias: Tensor | None,
    block: tuple[int, int],
    strides: tuple[int, int],
) -> Tensor:
    """Multiply with blocks that have ``block`` outputs and inputs, each with a stride in memory."""
    y = x.new_empty(x.shape[0], features)
    x, values, (height, depth) = x.contiguous(), values.contiguous(), block
    tile = (_tile(height, 128), _tile(depth, 128 // x.element_size()))
    panels = (part.pointers.shape[0] - 1) // (features // height)
    if not x.shape[0]:
        return y

    def grid(chosen: dict[str, Any]) -> tuple[int]:  # of one axis: others end at 65535
        return (features // tile[0] * triton.cdiv(x.shape[0], chosen["BATCH"]),)

    with torch.cuda.device_of(x):
        _rows[grid](
            *(x, values, y, *part, part.columns if places is None else places),
            values if bias is None else bias.contiguous(),
            *(x.shape[0], _size(x), x.shape[1], features, panels),
            *(places is not None, bias is not None, *block, *strides, *tile, _precision(x)),
        )
    return y


def _tile(side: int, most: int) -> int:
    """Return the largest power of two that divides a side, ``most`` at most."""
    return min(side & -side, most)


def _size(x: Tensor) -> int:
    """Return the power of two that a batch is within: kernels are tuned for each."""
    return x.shape[0].bit_length()


def _precision(x: Tensor) -> str:
    """Return in what float32 is multiplied: as torch multiplies it on a GPU."""
    if x.dtype != torch.float32:
        return "tf32"  # which no other dtype reads
    told = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch before 2.9 has none
    exact = torch.get_float32_matmul_precision() == "highest" if told is None else told != "tf32"
    return "ieee" if exact else "tf32"


def _tuned(names: list[str], ways: list[triton.Config]) -> Any:
    """Let Triton take the fastest of a few ways at the first call for each of what is named."""
    kept = "cache_results" in signature(triton.autotune).parameters  # on disk; in old ones it isn't
    options = {"cache_results": True} if kept else {}
    return triton.autotune(ways[-1:] if _INTERPRETED else ways, names, **options)


@_tuned(
    ["size", "HEIGHT", "DEPTH"],
    [triton.Config({"BATCH": n}, num_warps=w, num_stages=s) for n, w, s in _ROWS],
)
@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    x,
    values,
    y,
    pointers,
    columns,
    places,
    bias,
    batch,
    size,
    features_in,
    features_out,
    panels,
    PLACED: tl.constexpr,
    BIASED: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
):
    """y[n, o] = Σ_i x[n, i]·W[o, i] + b[o].

    A block of W is values[place]: o by DOWN, i by ACROSS.
    """
    tiles = features_out // TILE_H
    first = tl.program_id(0) % tiles * TILE_H
    row = first // HEIGHT
    outputs = tl.arange(0, TILE_H)
    inner = tl.arange(0, TILE_D)
    n = tl.program_id(0) // tiles * BATCH + tl.arange(0, BATCH)
    there = n[:, None] < batch
    line = n.to(tl.int64)[:, None]
    within = (first % HEIGHT + outputs)[None, :] * DOWN + inner[:, None] * ACROSS
    total = tl.zeros((BATCH, TILE_H), tl.float32)
    for k in range(tl.load(pointers + row * panels), tl.load(pointers + (row + 1) * panels)):
        place = tl.cast(k, tl.int64)
        if PLACED:
            place = tl.load(places + k).to(tl.int64)
        block = values + place * (HEIGHT * DEPTH) + within
        feature = tl.load(columns + k) * DEPTH
        for d in tl.static_range(0, DEPTH, TILE_D):
            inputs = tl.load(
                x + line * features_in + (feature + d + inner)[None, :], mask=there, other=0.0
            )
            weights = tl.load(block + d * ACROSS)
            total = tl.dot(inputs, weights, total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(bias + first + outputs).to(tl.float32)[None, :]
    out = y + line * features_out + (first + outputs)[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=there)


@_tuned(
    ["size", "HEIGHT", "WIDTH"],
    [triton.Config({}, num_warps=w, num_stages=s) for w, s in _DOTS],
)
@triton.jit
def _dots(  # type: ignore[no-untyped-def]
    g,
    x,
    gradient,
    pointers,
    columns,
    batch,
    size,
    features_out,
    features_in,
    rows,
    panels,
    halvings,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
):
    """gradient[k][o, i] = Σ_n g[n, o]·x[n, i] of a stored block k; zero where a place is unused."""
    across: tl.constexpr = WIDTH // TILE_W
    tiles: tl.constexpr = HEIGHT // TILE_H * across
    k = tl.program_id(0) // tiles
    top = tl.program_id(0) % tiles // across * TILE_H
    left = tl.program_id(0) % across * TILE_W
    row = 0  # the first that ends beyond k
    end = rows
    for _ in range(halvings):
        middle = (row + end) // 2
        beyond = tl.load(pointers + tl.minimum(middle + 1, rows) * panels) > k
        end = tl.where(beyond, middle, end)
        row = tl.where(beyond | (row >= end), row, middle + 1)
    used = row < rows
    o = top + tl.arange(0, TILE_H)
    i = left + tl.arange(0, TILE_W)
    gs = g + (row * HEIGHT + o)[None, :]
    xs = x + (tl.load(columns + k) * WIDTH + i)[None, :]
    total = tl.zeros((TILE_H, TILE_W), tl.float32)
    for start in range(0, batch, BATCH):
        n = start + tl.arange(0, BATCH)
        there = (n[:, None] < batch) & used
        line = n.to(tl.int64)[:, None]
        outputs = tl.load(gs + line * features_out, mask=there, other=0.0)
        inputs = tl.load(xs + line * features_in, mask=there, other=0.0)
        total = tl.dot(tl.trans(outputs), inputs, total, input_precision=PRECISION)
    out = gradient + k.to(tl.int64) * (HEIGHT * WIDTH) + o[:, None] * WIDTH + i[None, :]
    tl.store(out, total.to(gradient.dtype.element_ty))
