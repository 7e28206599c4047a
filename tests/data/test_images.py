"""The reader of IDX files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from topkast_func.data import fashion_mnist

CUT_OFF = gzip.compress(b"\x00\x00\x08\x01\x00", mtime=0)[:-9]


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return b"\x00\x00\x08" + bytes([array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    labels = np.array([7, 0], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_files_are_read_compressed_or_not(folder: Path) -> None:
    pixels, labels = fashion_mnist("test", folder)
    assert (pixels.shape, pixels.dtype) == ((2, 28, 28), torch.float32)
    assert float(pixels[0, 0, 5]) == pytest.approx(5 / 255)
    assert float(pixels.max()) == 1.0
    assert labels.tolist() == [7, 0]


def test_a_missing_file_says_how_to_get_it(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist("train", folder)


def test_an_unknown_part_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"part must be one of \('train', 'test'\), got 'all'"):
        fashion_mnist("all", folder)


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x03", b"\x00\x00\x0d\x01\x00\x00\x00\x00"])
def test_what_is_no_idx_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte in .* is no whole IDX file"):
        fashion_mnist("test", folder)


@pytest.mark.parametrize("content", [b"<html>", CUT_OFF])
def test_what_is_no_whole_compressed_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte in .* is no whole IDX file"):
        fashion_mnist("test", folder)


def test_a_header_that_is_cut_off_is_refused(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00")
    with pytest.raises(ValueError, match="is no whole IDX file"):
        fashion_mnist("test", folder)


def test_more_labels_than_images_are_refused(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="has 2 images and 3 labels"):
        fashion_mnist("test", folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no whole IDX file"):
        fashion_mnist("test", folder)
