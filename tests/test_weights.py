"""Safetensors files that others wrote."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from topkast_func import from_safetensors

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
ANY = torch.empty(0, device="meta")


def _tensors() -> dict[str, Tensor]:
    found = {str(kind): (3 * torch.randn(3, 5)).to(kind) for kind in DTYPES}
    return found | {"number": torch.tensor(2.0), "nothing": torch.empty(0, 4)}


def test_tensors_are_read_as_they_were_saved(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    read = from_safetensors(tmp_path / "x")
    found = {name: read(name, ANY) for name in tensors}
    torch.testing.assert_close(found, tensors, rtol=0.0, atol=0.0)


def test_a_tensor_of_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"weight": torch.ones(2), name: torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"'weight' is in two files, .*x and .*y"):
        from_safetensors(tmp_path / "x", tmp_path / "y")


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="needs a file, and got none"):
        from_safetensors()
    with pytest.raises(FileNotFoundError, match=r"there is no file at .*x"):
        from_safetensors(path)
    save_file({"weight": torch.ones(2, 3)}, path)
    whole = path.read_bytes()
    for content in (b"", b"no", whole[:30], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is cut off or is not a safetensors file"):
            from_safetensors(path)
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"no safetensors file that can be read: .* 24 bytes"):
        from_safetensors(path)
    for said in (b"[1, 2]", json.dumps({"weight": 3}).encode(), b"{" * 50):
        path.write_bytes(len(said).to_bytes(8, "little") + said)
        with pytest.raises(ValueError, match="no safetensors file that can be read"):
            from_safetensors(path)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"weight": torch.ones(2, 3)}, path)
    whole, read = path.read_bytes(), from_safetensors(path)
    status = path.stat()
    same, later = ((status.st_atime_ns, status.st_mtime_ns + n) for n in (0, 1))
    for content, times in (
        (whole[:-4], same),
        (whole + b"\0", same),
        (whole.replace(b"weight", b"height"), same),
        (whole[:-1] + b"\1", later),
    ):
        path.write_bytes(content)
        os.utime(path, ns=times)
        with pytest.raises(ValueError, match=r"x has changed since .* found 'weight' there"):
            read("weight", ANY)
    path.write_bytes(whole)
    os.utime(path, ns=same)
    assert torch.equal(read("weight", ANY), torch.ones(2, 3))
