"""Kernels are cut into parts in these tests, however little there is to do."""

from collections.abc import Iterator

import pytest

from topkast_func.kernels import llvm


@pytest.fixture(autouse=True, scope="module")
def _in_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llvm, "LITTLE", 0)
        yield
