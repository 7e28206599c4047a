"""Tensors in one file: of every dtype, as any reader of safetensors has them, or refused."""

import json
import re
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from topkast_func.files import container, layout

COMPLEX = [torch.complex64, torch.complex128]
TENSORS: dict[str, Tensor] = {
    "matrix": torch.arange(12.0).view(3, 4),
    "turned": torch.arange(12, dtype=torch.int64).view(3, 4).T,
    "number": torch.tensor(True),
    "empty": torch.zeros(0, 5, dtype=torch.float64),
    'θ/\x1b "': torch.tensor([1, -2], dtype=torch.int8),
    "strided": torch.arange(20, dtype=torch.int16)[::3],
    "one of a column": torch.ones(1, 5)[:, 0],
    "none, of one": torch.tensor(2.0).expand(0),
    "conjugate": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128).conj(),
    "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "pair": torch.tensor(1 - 1j, dtype=torch.complex64),
    "parameter": torch.nn.Parameter(torch.tensor([float("inf"), -0.0])),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in [*layout.CODES, *COMPLEX]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        container.write(stream, {"answer": 42}, TENSORS)
    return file


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with container.opened(path) as file, container.damage_of(path):
        return file.header, file.tensors()


def _bits(tensor: Tensor) -> bytes:
    whole = torch.clone(tensor.detach(), memory_format=torch.contiguous_format).flatten()
    return whole.view(torch.uint8).numpy().tobytes()


def _sealed(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the header of safetensors and give it a checksum that fits."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    edit(entries)
    text = json.dumps(entries).encode()
    head = len(text).to_bytes(8, "little") + text
    path.write_bytes(head + content[8 + length : -16] + blake2b(head, digest_size=16).digest())


def test_tensors_come_back_in_order_bit_for_bit(path: Path) -> None:
    header, tensors = _read(path)
    assert header["answer"] == 42
    assert list(tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        found = tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert _bits(found) == _bits(tensor), name


def test_the_library_safetensors_reads_the_same(path: Path) -> None:
    found = safetensors.torch.load_file(path)
    checksums = found.pop("checksums")
    assert found.keys() == TENSORS.keys()
    for row, (name, tensor) in zip(checksums, TENSORS.items(), strict=False):
        expected = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert _bits(found[name]) == _bits(expected)
        assert bytes(row.tolist()) == blake2b(_bits(expected), digest_size=16).digest()


def test_the_same_tensors_give_the_same_bytes(path: Path, tmp_path: Path) -> None:
    with (tmp_path / "again").open("wb") as stream:
        container.write(stream, {"answer": 42}, TENSORS)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_what_is_read_is_apart_from_the_file_and_from_the_default_device(path: Path) -> None:
    with torch.device("meta"):
        _, tensors = _read(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tensors["matrix"], TENSORS["matrix"])
    tensors["matrix"].add_(1)


def test_a_flipped_bit_of_any_byte_is_refused(tmp_path: Path) -> None:
    """Every byte of a small file, its padding included, one bit of each."""
    path = tmp_path / "small"
    with path.open("wb") as stream:
        container.write(stream, {}, {"\x1f": torch.tensor(1.0)})
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"small (is|has)"):
            _read(path)


def test_a_flipped_bit_of_a_tensor_names_the_tensor(path: Path) -> None:
    content = path.read_bytes()
    with container.opened(path) as file:
        places = {name: file.data + entry.start for name, entry in file.entries.items()}
        sizes = {name: entry.end - entry.start for name, entry in file.entries.items()}
    for name in (name for name in TENSORS if sizes[name]):
        changed = bytearray(content)
        changed[places[name] + sizes[name] - 1] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"damaged, .*: {re.escape(name)} does not match its"):
            _read(path)


def test_every_length_but_its_own_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in (*range(64), *range(64, len(content), 97), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut off"):
            _read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="its end is cut off"):
        _read(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 10_000])
def test_noise_is_refused(path: Path, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    path.write_bytes(noise.numpy().tobytes())
    with pytest.raises(ValueError, match="is cut off or is not a safetensors file"):
        _read(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, "{]", "\xff", "", '{"a":' * 50_000, '"\\ud800'], ids=len
)
def test_a_header_that_is_no_json_is_refused(path: Path, text: str) -> None:
    content = text.encode("latin-1")
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(99))
    with pytest.raises(ValueError, match="is cut off or is not a safetensors file"):
        _read(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"topkast_func": "[" * 100_000}])
def test_a_file_of_someone_else_is_refused(path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2, 2)}, path, metadata)
    with pytest.raises(ValueError, match="but not one that topkast_func saved"):
        _read(path)


@pytest.mark.parametrize(
    "text", ["1", "[]", "{}", "null", '"__metadata__"', '{"__metadata__": []}']
)
def test_a_header_of_another_form_is_refused(path: Path, text: str) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(99))
    with pytest.raises(ValueError, match="but not one that topkast_func saved"):
        _read(path)


@pytest.mark.parametrize(
    ("version", "way_on"),
    [(5, "install a newer one"), (10**400, "install a newer one"), (3, "save the state anew")],
)
def test_another_version_is_refused_whatever_else_it_holds(
    path: Path, version: int, way_on: str
) -> None:
    header = json.dumps({"format": container.FORMAT, "version": version})
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"topkast_func": header})
    with pytest.raises(ValueError, match=rf"has format version .*; .* reads 4, so {way_on}"):
        _read(path)


def _own(entries: dict[str, Any], changes: dict[str, Any]) -> None:
    header = json.loads(entries["__metadata__"]["topkast_func"])
    entries["__metadata__"]["topkast_func"] = json.dumps(header | changes)


FORGED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda e: e["matrix"].update(dtype="F31"), r"matrix has dtype 'F31', which is none of"),
    (lambda e: e["matrix"].update(dtype=["F32"]), "matrix has dtype"),
    (lambda e: e["matrix"].update(dtype="F64"), "matrix of F64 and shape .3, 4. is at bytes"),
    (lambda e: e["matrix"].update(shape=[3, 5]), "matrix of F32 and shape .3, 5. is at bytes"),
    (lambda e: e["matrix"].update(shape=[10**9]), "matrix of F32 and shape .1000000000."),
    (lambda e: e["matrix"].update(shape=[-3, -4]), r"matrix has shape \[-3, -4\]"),
    (lambda e: e["matrix"].update(shape=[3.0, 4]), r"matrix has shape \[3.0, 4\]"),
    (lambda e: e["number"].update(shape=[True]), r"number has shape \[True\]"),
    (lambda e: e["number"].update(shape=[1] * 65), "number has shape"),
    (lambda e: e["empty"].update(shape=[0, 2**62, 2**62]), "empty has shape"),
    (lambda e: e["matrix"].update(shape="34"), "matrix has shape '34'"),
    (lambda e: e["matrix"].update(data_offsets=[0]), r"matrix is at bytes \[0\]"),
    (lambda e: e["matrix"].update(data_offsets=[-48, 0]), "matrix is at bytes"),
    (
        lambda e: e["matrix"].update(data_offsets=[10**30, 10**30 + 48]),
        r"matrix is at bytes \[1000",
    ),
    (lambda e: e["matrix"].update(data_offsets=[0, 48]), "begins at byte 0, not at"),
    (lambda e: e["matrix"].pop("shape"), "matrix is described as"),
    (lambda e: e["matrix"].update(more=1), "matrix is described as"),
    (lambda e: e.update(matrix=3), "matrix is described as 3"),
    (lambda e: e.update(matrix="x" * 10**6), "matrix is described as"),
    (lambda e: e.pop("matrix"), "begins at byte"),
    (lambda e: e.pop("checksums"), "and there are"),
    (lambda e: e.update({n: e.pop(n) for n in [*TENSORS]}), "(its tensors have|is no table of)"),
    (lambda e: e["checksums"].update(dtype="I8"), "(its tensors have|is no table of)"),
    (lambda e: [e.pop(n) for n in [*e] if n != "__metadata__"], "and there are"),
    (lambda e: _own(e, {"version": "4"}), "its version is '4'"),
    (lambda e: _own(e, {"version": 4.0}), "its version is 4.0"),
    (lambda e: _own(e, {"complex": 3}), "the names of complex tensors are 3"),
    (lambda e: _own(e, {"complex": [3]}), r"the names of complex tensors are \[3\]"),
    (lambda e: _own(e, {"complex": ["matrix"]}), "matrix is not the parts of a complex tensor"),
    (lambda e: _own(e, {"complex": ["none"]}), "none is not the parts of a complex tensor"),
    (lambda e: _own(e, {"complex": ["number"]}), "number is not the parts of a complex tensor"),
]


@pytest.mark.parametrize(("edit", "message"), FORGED, ids=range(len(FORGED)))
def test_an_impossible_header_is_refused_though_its_checksum_fits(
    path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    _sealed(path, lambda entries: None)
    _read(path)
    _sealed(path, edit)
    with pytest.raises(
        ValueError, match=rf"is damaged, so nothing was loaded: .*{message}"
    ) as info:
        _read(path)
    assert len(str(info.value)) < 1000


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no state at"):
            _read(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.ones(2, 2).to_sparse(),
            "buffers/x has layout torch.sparse_coo, which no file holds",
        ),
        (
            torch.ones(2).to(torch.float8_e4m3fnuz),
            "buffers/x has dtype torch.float8_e4m3fnuz",
        ),
    ],
)
def test_what_no_file_holds_is_named(tmp_path: Path, tensor: Tensor, message: str) -> None:
    with (tmp_path / "file").open("wb") as stream, pytest.raises(TypeError, match=message):
        container.write(stream, {}, {"buffers/x": tensor})
