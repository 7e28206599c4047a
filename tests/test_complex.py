"""Complex parameters, as of Fourier layers: they train dense, beside sparse real ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.5, 0.25, refresh_every=2, penalty=None)
OPTIMIZERS: dict[str, tuple[tk.Optimizer, Any]] = {
    "sgd": (tk.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "adamw": (tk.adamw(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
}


class Spectral(nn.Module):
    """A linear layer, then a product in Fourier space."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Any = nn.Linear(8, 8)
        self.second: Any = nn.Module()
        self.second.weight = nn.Parameter(torch.randn(5, 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.first(x)) * self.second.weight.squeeze(1)
        return torch.fft.irfft(spectrum, n=8)


def _loss(apply: Any, batch: Tensor) -> Tensor:
    return (apply(batch) - batch.flip(1)).square().mean()


def _batches() -> Tensor:
    return torch.randn(5, 16, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("storage", ["compact", "dense"])
@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_they_train_as_under_torch_optim(storage: Any, name: str, compile: Any) -> None:
    """With a dense first layer, so that there is nothing else to compare."""
    model, (optimizer, reference) = Spectral(), OPTIMIZERS[name]
    config = tk.TopKastConfig(0.0, 0.0, penalty=None)
    state = tk.init_state(model, config, optimizer, storage=storage)
    step = tk.make_train_step(model, _loss, config, optimizer, compile=compile)
    for batch in _batches():
        state, _ = step(state, batch)
    theta = tk.dense_params(state)
    before = model.second.weight.detach().clone()
    optimizer_of_torch = reference(model.parameters())
    for batch in _batches():
        optimizer_of_torch.zero_grad()
        torch.autograd.backward(_loss(model, batch))
        optimizer_of_torch.step()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(theta[key], parameter.detach(), rtol=1e-4, atol=1e-5)
    moved = theta["second.weight"] - before
    assert (moved.real.abs() > 1e-4).all()
    assert (moved.imag[1:-1].abs() > 1e-4).all()  # the ends of a spectrum are real


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_compiled_equals_eager_beside_a_sparse_layer(storage: Any) -> None:
    model, (optimizer, _) = Spectral(), OPTIMIZERS["adamw"]
    ends = []
    for compile in (False, {"backend": "aot_eager"}):
        state = tk.init_state(model, CONFIG, optimizer, storage=storage)
        assert list(tk.masks_of(state)) == ["first.weight"]
        step = tk.make_train_step(model, _loss, CONFIG, optimizer, compile=compile)
        for batch in _batches():
            state, _ = step(state, batch)
        ends.append(tk.dense_params(state))
    explored = tk.masks_of(state)["first.weight"]
    moved = ends[0]["first.weight"] != model.first.weight.detach()
    assert moved[explored.backward & ~explored.forward].any()
    torch.testing.assert_close(ends[1], ends[0])


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_a_run_with_them_resumes_from_a_file_alone(storage: Any, tmp_path: Any) -> None:
    model, (optimizer, _) = Spectral(), OPTIMIZERS["adamw"]
    step = tk.make_train_step(model, _loss, CONFIG, optimizer, compile=False)
    state = tk.init_state(model, CONFIG, optimizer, storage=storage)
    for number, batch in enumerate(_batches()):
        if number == 3:
            tk.save(state, tmp_path / "state", CONFIG)
            resumed = tk.load(tmp_path / "state", None, model, optimizer)
        state, _ = step(state, batch)
    for batch in _batches()[3:]:
        resumed, _ = step(resumed, batch)
    first, second = tk.dense_params(resumed), tk.dense_params(state)
    assert first["second.weight"].dtype == torch.complex64
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("sparse", ["*weight", lambda name, tensor: tensor.ndim == 2])
def test_what_selects_one_is_told(sparse: Any) -> None:
    config = tk.TopKastConfig(0.5, 0.25, sparse=sparse)
    with pytest.raises(ValueError, match=r"\['second.weight'\], of complex numbers, .* keep_dense"):
        tk.init_state(Spectral(), config, tk.sgd(0.1))
    config = tk.TopKastConfig(0.5, 0.25, sparse=sparse, keep_dense="second.weight")
    assert list(tk.masks_of(tk.init_state(Spectral(), config, tk.sgd(0.1)))) == ["first.weight"]
