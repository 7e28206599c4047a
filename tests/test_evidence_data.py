"""What the evidence is trained on: images from IDX files, text as codes, windows of it."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.evidence.networks import ALPHABET
from benchmarks.evidence.tasks import LENGTH, bible, codes, idx, source, windows


def write(folder: Path, array: npt.NDArray[np.uint8], cut: int | None = None) -> None:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    content = b"\x00\x00\x08" + bytes([array.ndim]) + sizes + array.tobytes()
    (folder / "part-ubyte.gz").write_bytes(gzip.compress(content[:cut]))


@pytest.mark.parametrize("shape", [(7,), (2, 28, 28)])
def test_idx_files_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    write(tmp_path, array)
    found = idx("part", tmp_path)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), array)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    write(tmp_path, np.zeros((2, 28, 28), np.uint8), cut=-1)
    with pytest.raises(ValueError, match="cannot reshape"):
        idx("part", tmp_path)


def test_codes_spell_the_text() -> None:
    found = codes("abracadabra é")
    assert "".join(" abcdré"[code] for code in found) == "abracadabra é"


def test_characters_beyond_the_alphabet_share_its_last_code() -> None:
    frequent = "".join(map(chr, range(0x4E00, 0x4E00 + ALPHABET - 1)))
    found = codes(2 * frequent + "ab")
    assert sorted(set(found.tolist())) == list(range(ALPHABET))
    assert found[-2:].tolist() == [ALPHABET - 1] * 2


def test_source_is_python_in_an_order_of_its_own() -> None:
    text = source()
    assert text == source()
    assert text.count("\nclass TextWrapper:") == 1


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        idx("part", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install bible-kjv && bible -f"):
        bible(tmp_path / "none")


def test_windows_lie_within_the_text_and_reach_both_ends() -> None:
    inputs, targets = windows(torch.arange(LENGTH + 7), 200, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (200, LENGTH)
    assert torch.equal(targets, inputs + 1)
    assert (int(inputs.min()), int(targets.max())) == (0, LENGTH + 6)
