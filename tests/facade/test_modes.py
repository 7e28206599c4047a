"""What others do with modules: shapes without numbers, and quantization."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.8, 0.6, refresh_every=1)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


@pytest.mark.parametrize("engine", ["dense", "numba"])
def test_a_pass_without_numbers_tells_shapes_and_leaves_the_model(engine: Any) -> None:
    model, x = _model(), torch.randn(4, 16)
    sparsifier = tk.sparsify(model, CONFIG, engine=engine)
    before, y = copy.deepcopy(model.state_dict()), model(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = model(mode.from_tensor(x))
        (shape.sum() + sparsifier.penalty()).backward()
        for use in (sparsifier.refresh, lambda: tk.sparsify(_model(), CONFIG)):
            with pytest.raises(RuntimeError, match="none under FakeTensorMode: call it before"):
                use()
    assert isinstance(shape, FakeTensor)
    assert shape.shape == y.shape
    model.zero_grad()
    assert torch.equal(model(x), y)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*(deprecated|quantize_per_tensor)")
def test_a_sparse_model_is_not_quantized_without_a_word() -> None:
    model: Any = _model()
    tk.sparsify(model, CONFIG)
    quantize: Any = torch.ao.quantization.quantize_dynamic
    with pytest.raises(TypeError, match=r"no sparse Linear .* tk\.densify\(copy\.deepcopy\("):
        quantize(model, {nn.Linear})
    assert type(quantize(tk.densify(copy.deepcopy(model)), {nn.Linear})[0]) is not nn.Linear
