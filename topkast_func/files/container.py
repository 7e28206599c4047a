"""Tensors and a JSON header in one safetensors file, every byte of it under a checksum.

The file is read by hand, through one descriptor: the header is not believed before it has been
compared with its checksum and with the size of the file, and no tensor before its own.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from topkast_func.files.layout import (
    Entry,
    as_json,
    check_places,
    entry_of,
    laid_out,
    storable,
)
from topkast_func.reading import check_numbers
from topkast_func.types import Tensors

FORMAT, VERSION = "topkast_func state", 4
METADATA, HEADER, CHECKSUMS = "__metadata__", "topkast_func", "checksums"
DIGEST = 16
"""Bytes of a checksum."""
LIMIT = 100_000_000
"""Most bytes of a header of safetensors."""
PARTS = (torch.float16, torch.float32, torch.float64)
"""Dtypes of the real and the imaginary part of a complex number."""


class Container(NamedTuple):
    """A file of which the header was checked.

    Attributes:
        header: The JSON object that `write` wrote.
        entries: The tensors by name, in order, the table of checksums last.
        file: The file, open.
        data: Where in it the data of the tensors begin.
    """

    header: dict[str, Any]
    entries: dict[str, Entry]
    file: BufferedReader
    data: int

    def tensors(self) -> Tensors:
        """Read the tensors.

        Returns:
            The tensors by name, on the CPU, in the order in which they were written.

        Raises:
            ValueError: One does not match its checksum.
        """
        *names, table = self.entries
        checksums = self._bytes(table).view(-1, DIGEST)
        found = {}
        for name, checksum in zip(names, checksums, strict=False):
            content = self._bytes(name)
            if _digest(content) != bytes(checksum.tolist()):
                raise ValueError(f"{name} does not match its checksum")
            entry = self.entries[name]
            found[name] = content.view(entry.dtype).view(entry.shape)
        return found | {name: torch.view_as_complex(found[name]) for name in self.header["complex"]}

    def _bytes(self, name: str) -> Tensor:
        entry = self.entries[name]
        content = torch.empty(entry.end - entry.start, dtype=torch.uint8, device="cpu")
        self.file.seek(self.data + entry.start)
        if self.file.readinto(content.numpy().data) != len(content):
            raise ValueError(f"{name} is cut off")
        return content


def write(file: BinaryIO, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with a header.

    The file is one of safetensors, little-endian: the length of a JSON text, the text, which has
    dtype, shape and place of each tensor in the order of ``tensors``, and their data. Its
    metadata have one entry, ``topkast_func``: ``header`` in JSON with the ``format``, its
    ``version`` and, under ``complex``, the names of the tensors of a complex dtype, which are
    stored as real ones with a last axis of 2. The last tensor is ``checksums``, uint8,
    [tensors + 1, 16]: BLAKE2b of the data of each tensor, and in the last row of all that comes
    before the data.

    Args:
        file: Where to.
        header: JSON object.
        tensors: Tensors by name, on any device.

    Raises:
        TypeError: A tensor has a layout or a dtype that safetensors has not.
    """
    complex_ones = [name for name, tensor in tensors.items() if tensor.is_complex()]
    full = {"format": FORMAT, "version": VERSION, "complex": complex_ones, **header}
    parts = {name: storable(name, tensor.detach()) for name, tensor in tensors.items()}
    table = torch.empty(len(parts) + 1, DIGEST, dtype=torch.uint8, device="meta")
    entries = laid_out({**parts, CHECKSUMS: table})
    said = {name: as_json(entry) for name, entry in entries.items()}
    text = json.dumps({METADATA: {HEADER: json.dumps(full)}, **said}).encode()
    text += b" " * (-len(text) % 8)
    file.write(head := len(text).to_bytes(8, "little") + text)
    checksums = dict.fromkeys(parts, b"")
    for name in sorted(parts, key=lambda name: entries[name].start):
        content = _content(parts[name])
        checksums[name] = _digest(content)
        file.write(content.numpy().data)
    file.write(b"".join(checksums.values()) + _digest(head))


@contextmanager
def opened(path: Path) -> Iterator[Container]:
    """Open a file that `write` wrote, and check its header.

    Args:
        path: The file.

    Yields:
        The file; its tensors are still to be read.

    Raises:
        FileNotFoundError: There is no such file, or a folder in its place.
        ValueError: It is cut off, damaged, foreign, or of another version.
    """
    check_numbers(f"what opens {path}")
    if path.is_dir():
        raise FileNotFoundError(
            f"there is no state at {path}, which is a folder: name a file in it, or read what "
            "save_sharded wrote by load_sharded"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no state at {path}")
    with path.open("rb") as file:
        head = head_of(path, file)
        size = os.fstat(file.fileno()).st_size
        said, header = _parsed(path, head[8:])
        with damage_of(path):
            file.seek(-DIGEST, os.SEEK_END)
            if file.read() != _digest(head):
                raise ValueError("its header does not match its checksum, or its end is cut off")
            entries = _entries(said, size - len(head))
            _check_header(header, entries)
        yield Container(header, entries, file, len(head))


def head_of(path: Path, file: BinaryIO) -> bytes:
    """Read what comes before the data of a safetensors file: a length, and a JSON text of it.

    Args:
        path: The file, for errors.
        file: The same, open, at its beginning.

    Returns:
        Length and text.

    Raises:
        ValueError: The file is shorter than that, or the text is longer than one may be.
    """
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if length > min(os.fstat(file.fileno()).st_size - 8, LIMIT):
        raise ValueError(f"{path} is cut off or is not a safetensors file")
    return head + file.read(length)


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Name the damaged file in a ValueError.

    Args:
        path: The file.

    Yields:
        Nothing.

    Raises:
        ValueError: The context raised one.
    """
    try:
        yield
    except ValueError as reason:
        raise ValueError(f"{path} is damaged, so nothing was loaded: {reason!s:.500}") from reason


def _parsed(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the header of safetensors says of tensors, and the header of the state."""
    try:
        said = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is cut off or is not a safetensors file") from None
    try:
        header = json.loads(said.pop(METADATA)[HEADER])
        ours = header["format"] == FORMAT
    except (ValueError, RecursionError, TypeError, AttributeError, LookupError):
        ours = False
    if not ours:
        raise ValueError(f"{path} is a safetensors file, but not one that topkast_func saved")
    version = header.get("version")
    if type(version) is int and version != VERSION:
        way_on = "install a newer one" if version > VERSION else "save the state anew"
        raise ValueError(
            f"{path} has format version {short(version)}; this topkast_func reads {VERSION}, "
            f"so {way_on}"
        )
    return said, header


def _entries(said: Mapping[str, Any], size: int) -> dict[str, Entry]:
    entries = {name: entry_of(name, entry) for name, entry in said.items()}
    check_places(entries, size)
    rows = len(entries)
    table = Entry(torch.uint8, (rows, DIGEST), size - rows * DIGEST, size)
    if [*entries.items()][-1:] != [(CHECKSUMS, table)]:
        raise ValueError(f"its last tensor is no table of {rows} {CHECKSUMS}")
    return entries


def _check_header(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    version, names = header.get("version"), header.get("complex")
    if type(version) is not int:
        raise ValueError(f"its version is {short(version)}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the names of complex tensors are {short(names)}")
    for name in names:
        pairs = entries.get(name)
        if pairs is None or pairs.dtype not in PARTS or pairs.shape[-1:] != (2,):
            raise ValueError(f"{name} is not the parts of a complex tensor: {pairs}")


def _content(tensor: Tensor) -> Tensor:
    flat = tensor.cpu().resolve_neg().contiguous().flatten()
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one entry may have any stride


def _digest(content: Tensor | bytes) -> bytes:
    data = content.numpy().data if isinstance(content, Tensor) else content
    return blake2b(data, digest_size=DIGEST).digest()
