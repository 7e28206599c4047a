"""Compiled sparse modules, and copies made in mid-run."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def test_a_compiled_module_runs_again_and_again_in_any_thread() -> None:
    """None has run eager in the thread before, which would settle what Dynamo guards."""
    found: list[Tensor | Exception] = []

    def call() -> None:
        try:
            found.extend(compiled(x) for _ in range(3))
        except Exception as reason:
            found.append(reason)

    for _ in range(2):
        torch.compiler.reset()
        model, x = perceptron(), torch.randn(4, 8)
        tk.sparsify(model, tk.TopKastConfig(0.5))
        compiled = torch.compile(model, backend="eager")
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(found) == 6
    assert all(isinstance(y, Tensor) and y.shape == (4, 1) for y in found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
@pytest.mark.parametrize("every", [1, 4])
def test_a_copy_goes_on_where_a_gradient_is_to_be_read(copied: Any, every: int) -> None:
    model = perceptron().double()
    config = tk.TopKastConfig(0.5, refresh_every=every, method=tk.rigl())
    sparsifier = tk.sparsify(model, config, engine="dense")
    run = (model, torch.optim.SGD(model.parameters(), 0.1), sparsifier)
    x = torch.randn(4, 8, dtype=torch.float64)

    def trained(run: Any, steps: int) -> Any:
        model, optimizer, sparsifier = run
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            sparsifier.step()
        return run

    other = copied(trained(run, 3))
    for one, two in zip(*(trained(r, 6)[0].parameters() for r in (run, other)), strict=True):
        assert torch.equal(one, two)
