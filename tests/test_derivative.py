"""Gradients by autograd in eager steps, by torch.func where a graph is traced: the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from topkast_func.training.derivative import gradient_and_value
from topkast_func.types import Tensors


def _objective(values: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    rest = values["weight"] * torch.arange(3.0)
    return (rest**3).sum(), {"rest": rest, "as_given": values["other"]}


@pytest.fixture
def values() -> Tensors:
    return {"weight": torch.tensor([1.0, -2.0, 0.5]), "other": torch.ones(2, dtype=torch.float64)}


def _same(one: Any, other: Any) -> None:
    (gradients, (loss, beside)), (other_gradients, (other_loss, other_beside)) = one, other
    assert torch.equal(loss, other_loss)
    for found, expected in ((gradients, other_gradients), (beside, other_beside)):
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype


def test_both_ways_agree_and_leave_what_they_are_given(values: Tensors) -> None:
    expected = grad_and_value(_objective, has_aux=True)(values)
    assert expected[0]["weight"].abs().min() == 0 < expected[0]["weight"].abs().max()
    with torch.no_grad():
        found = gradient_and_value(_objective, values)
    _same(found, expected)
    loss, beside = found[1]
    assert not any(t.requires_grad for t in (loss, *beside.values(), *values.values()))


def test_a_compiled_call_equals_an_eager_one(values: Tensors) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(values: Tensors) -> Any:
        with torch.no_grad():
            return gradient_and_value(_objective, values)

    _same(compiled(values), gradient_and_value(_objective, values))


def test_within_a_transform_it_is_mapped_over(values: Tensors) -> None:
    batched = {name: torch.stack((value, 2 * value)) for name, value in values.items()}
    gradients, _ = vmap(lambda values: gradient_and_value(_objective, values))(batched)
    for i in (0, 1):
        alone, _ = gradient_and_value(_objective, {n: v[i] for n, v in batched.items()})
        assert torch.equal(gradients["weight"][i], alone["weight"])


def test_what_does_not_depend_on_the_values_has_zeros(values: Tensors) -> None:
    found, (loss, _) = gradient_and_value(lambda _: (torch.tensor(2.0), ()), values)
    assert loss == 2
    assert all(not found[name].any() and found[name].shape == values[name].shape for name in values)
