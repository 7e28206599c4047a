"""Weights in safetensors files, whoever wrote them, read one tensor at a time."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from topkast_func.files.container import METADATA, head_of
from topkast_func.files.drafts import path_of
from topkast_func.files.layout import Entry, check_places, entry_of


class File(NamedTuple):
    """A file as it was found: its size and time of writing, and its head, all before the data."""

    path: Path
    written: tuple[int, int]
    head: bytes


class Place(NamedTuple):
    """Place of a tensor: its file, and its entry in the header."""

    file: File
    entry: Entry


def from_safetensors(
    *paths: str | os.PathLike[str],
) -> Callable[[str, Tensor], Tensor]:
    """Return a function that reads the tensors of safetensors files by their names.

    It is for ``init_state(..., materialize=…)``, which asks it for one tensor at a time, so that
    no more of the files is in memory. Names that nobody asks for are passed over. Where names or
    dtypes differ from those of the module, wrap it: ``lambda name, tensor: read(name.removeprefix(
    "model."), tensor).to(tensor.dtype)``.

    Args:
        *paths: The files: one, or the parts of a checkpoint that is in several.

    Returns:
        ``read(name, tensor)`` to the tensor of that name, on the CPU, in the shape and dtype that
        it has in the file. It raises ValueError where there is none, or the file has changed.

    Raises:
        FileNotFoundError: A file is not there.
        TypeError: A path is none.
        ValueError: There is no file, one is cut off, damaged or of another format, or two have a
            tensor of the same name.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> file = tempfile.NamedTemporaryFile(suffix=".safetensors")
        >>> save_file({"weight": torch.ones(2, 3)}, file.name)
        >>> from_safetensors(file.name)("weight", torch.empty(2, 3, device="meta"))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    if not paths:
        raise ValueError("from_safetensors needs a file, and got none")
    places: dict[str, Place] = {}
    for path in (path_of("a path of from_safetensors", path) for path in paths):
        for name, place in _places(path).items():
            other = places.setdefault(name, place)
            if other is not place:
                raise ValueError(f"{name!r} is in two files, {other.file.path} and {path}")

    def read(name: str, tensor: Tensor) -> Tensor:
        if name not in places:
            files = ", ".join(map(str, paths))
            raise ValueError(
                f"{name!r} is not in {files}, which has {sorted(places)}: if it goes by another "
                "name there, or is to be made otherwise, materialize is to be a function that says "
                "so, and calls what from_safetensors returned for the rest"
            )
        return _read(name, places[name])

    return read


def _places(path: Path) -> dict[str, Place]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file at {path}")
    with path.open("rb") as file:
        head = head_of(path, file)
        found = File(path, _written(file), head)
    try:
        said = dict(json.loads(head[8:].decode()))
        said.pop(METADATA, None)
        entries = {name: entry_of(name, entry) for name, entry in said.items()}
        check_places(entries, found.written[0] - len(head))
    except (ValueError, TypeError, RecursionError) as reason:
        raise ValueError(f"{path} is no safetensors file that can be read: {reason}") from reason
    return {name: Place(found, entry) for name, entry in entries.items()}


def _written(file: BinaryIO) -> tuple[int, int]:
    """Return the size of a file, bytes, and when it was written to, nanoseconds."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _read(name: str, place: Place) -> Tensor:
    (path, written, head), entry = place
    content = torch.empty(entry.end - entry.start, dtype=torch.uint8, device="cpu")
    with path.open("rb") as file:
        same = _written(file) == written and file.read(len(head)) == head
        file.seek(len(head) + entry.start)
        if not same or file.readinto(content.numpy().data) != len(content):
            raise ValueError(
                f"{path} has changed since from_safetensors found {name!r} there: call that again"
            )
    return content.view(entry.dtype).view(entry.shape)
