"""The dense products where oneDNN is not there."""

import pytest
import torch

from tests.kernels.problems import check_products, problem


@pytest.mark.parametrize("batch", [0, 5])
def test_products_without_onednn(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    check_products("dense", problem(), batch)
