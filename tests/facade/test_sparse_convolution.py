"""Convolutions of ordinary loops on the kernels: the trajectory of `train_step`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from topkast_func.facade import sparse_convolution
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.model.convolution import convolved

CONFIG = tk.TopKastConfig(0.8, 0.5, refresh_every=2, penalty=None, keep_dense="4.*")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()


def batches() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 3, 8, 8, dtype=torch.float64, generator=draw)


def looped(engine: Any, config: tk.TopKastConfig = CONFIG) -> nn.Module:
    model = network()
    sparsifier = tk.sparsify(model, config, engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x in batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    return model


def test_an_ordinary_loop_trains_as_train_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watched(*arguments: Any) -> Tensor | None:
        y = convolved(*arguments)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(sparse_convolution, "convolved", watched)
    model, optimizer = network(), tk.sgd(0.1, momentum=0.9)
    state = tk.init_state(model, CONFIG, optimizer, storage="dense")
    step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), CONFIG, optimizer, compile=False
    )
    for x in batches():
        state, _ = step(state, x)
    found = dict(looped("numba").named_parameters())
    assert seen == 10 * [True]
    torch.testing.assert_close({n: found[n].detach() for n in found}, tk.dense_params(state))


def test_alpha_is_not_put_together_where_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    tk.sparsify(model, CONFIG, engine="numba")
    expected = model(batches()[0])
    monkeypatch.delattr(SparseWeight, "alpha")
    torch.testing.assert_close(model(batches()[0]), expected)


def test_a_method_that_reads_the_dense_gradient_gets_it() -> None:
    config = tk.TopKastConfig(0.8, refresh_every=2, method=tk.rigl(), penalty=None)
    on_kernels, dense = (dict(looped(e, config).named_parameters()) for e in ("numba", "dense"))
    torch.testing.assert_close(on_kernels, dense)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_gradients_are_those_of_masks(backend: str) -> None:
    torch.compiler.reset()
    found = []
    for engine in ("numba", "dense"):
        model = network()
        sparsifier = tk.sparsify(model, CONFIG, engine=engine)
        run = torch.compile(model, backend=backend) if engine == "numba" else model
        run(batches()[0]).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    masks = sparsifier.masks()["0.weight"]
    gradient = found[0]["0.weight"]
    assert gradient is not None
    assert gradient[masks.backward & ~masks.forward].all()
    torch.testing.assert_close(*found)


def test_blocks_and_groups_compute_with_alpha() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    sparsifier = tk.sparsify(model, tk.TopKastConfig(0.5, 0.25, block_shape=(2, 2)))
    engines = {row.name: row.engine for row in sparsifier.summary().rows}
    assert (engines["0.weight"], engines["1.weight"]) == ("dense", "dense")
