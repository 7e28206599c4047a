"""Where tensors stand in a safetensors file: written, and believed only as far as it fits."""

import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""Dtypes by the name that safetensors has for them."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
MOST_AXES = 64
"""Most axes that NumPy and PyTorch work with."""


class Entry(NamedTuple):
    """Dtype and shape of a tensor, and from where to where its bytes are in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def laid_out(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Give tensors their places: one after another, the widest numbers first, so aligned.

    Args:
        tensors: Tensors by name, of the dtypes that safetensors has.

    Returns:
        Their entries, in the order of ``tensors``.
    """
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
        start, end = end, end + tensors[name].nbytes
        places[name] = start, end
    return {n: Entry(t.dtype, tuple(t.shape), *places[n]) for n, t in tensors.items()}


def as_json(entry: Entry) -> dict[str, Any]:
    """Return what the header of safetensors says of a tensor; inverse of `entry_of`."""
    dtype, shape, *offsets = entry
    return {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}


def entry_of(name: str, said: object) -> Entry:
    """Check what a header says of a tensor by itself.

    Args:
        name: Name of the tensor, for errors.
        said: JSON of any kind.

    Returns:
        The entry; its bytes are as many as its dtype and shape have.

    Raises:
        ValueError: It is not what a header says.
    """
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is described as {short(said)}")
    code, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{name} has dtype {short(code)}, which is none of {list(DTYPES)}")
    if not is_shape(shape):
        raise ValueError(f"{name} has shape {short(shape)}")
    if not is_shape(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} is at bytes {short(offsets)}")
    entry = Entry(DTYPES[code], tuple(shape), *offsets)
    if entry.end - entry.start != math.prod(shape) * entry.dtype.itemsize:
        raise ValueError(f"{name} of {code} and shape {shape} is at bytes {offsets}")
    return entry


def check_places(entries: Mapping[str, Entry], size: int) -> None:
    """Check that tensors fill the data of a file, without a gap and without an overlap.

    Args:
        entries: The tensors by name.
        size: Bytes of data that the file has.

    Raises:
        ValueError: They do not.
    """
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != reached:
            raise ValueError(f"{name} begins at byte {entry.start}, not at {reached}")
        reached = entry.end
    if reached != size:
        raise ValueError(f"its tensors have {reached} bytes, and there are {size}")


def is_shape(value: object) -> bool:
    """Return whether a value from JSON is a shape that a tensor can have."""
    if not isinstance(value, list) or len(value) > MOST_AXES:
        return False
    whole = all(type(side) is int and side >= 0 for side in value)
    return whole and math.prod(max(side, 1) for side in value) < 2**63


def storable(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as a file holds it: of real numbers, those of complex ones in pairs.

    Args:
        name: Its name.
        tensor: The tensor.

    Returns:
        The same memory, if it can.

    Raises:
        TypeError: It has a layout or a dtype that no file holds.
    """
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, which no file holds")
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype not in CODES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, which no file holds")
    return tensor
