"""Tensors that are put together when they are first read."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from topkast_func import TopKastConfig, compute_masks, index_masks, sparse_forward
from topkast_func.model.alpha import alpha_when_read
from topkast_func.model.deferred import Deferred

VALUES, PLACES = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3, 1])
REAL = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def deferred() -> tuple[Deferred, list[Tensor]]:
    made: list[Tensor] = []

    def make() -> Tensor:
        made.append(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        return made[-1]

    return Deferred.of((2, 2), VALUES, make), made


def alpha_of(values: Tensor) -> Tensor:
    return alpha_when_read(values, PLACES.tensor_split([2]), (2, 2))


def test_it_is_made_once_and_only_when_it_is_read() -> None:
    tensor, made = deferred()
    told = (
        tensor.shape,
        tensor.dtype,
        tensor.device,
        tensor.stride(),
        tensor._version,
        len(tensor),
    )
    assert told == ((2, 2), torch.float32, torch.device("cpu"), (2, 1), 0, 2)
    assert not made
    assert_close(tensor.t() @ torch.ones(2), torch.tensor([4.0, 6.0]))
    assert type(tensor.detach() + tensor) is Tensor
    assert len(made) == 1


def test_what_is_written_to_it_is_seen_and_counted() -> None:
    tensor, _ = deferred()
    assert tensor.mul_(2) is tensor
    tensor.view(-1)[0] = 7.0
    assert tensor.tolist() == [[7.0, 4.0], [6.0, 8.0]]
    assert tensor._version == 2


def test_what_asks_no_operator_gets_the_real_tensor() -> None:
    for found in (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), lambda t: t.numpy()):
        assert found(deferred()[0]).tolist() == [[1.0, 2.0], [3.0, 4.0]]  # type: ignore[no-untyped-call]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


READERS: list[Callable[[Tensor], Tensor]] = [
    lambda weight: 2 * weight.real,
    lambda weight: weight + weight.view(-1).view(2, 2),
    lambda weight: Doubled.apply(weight),  # type: ignore[no-untyped-call]
    torch.compile(lambda weight: 2 * weight, backend="aot_eager"),
]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo asks any tensor for it
@pytest.mark.parametrize("read", READERS)
def test_the_gradient_of_whoever_reads_alpha_reaches_b(read: Callable[[Tensor], Tensor]) -> None:
    values = VALUES.clone().requires_grad_()
    found = alpha_of(values)
    assert isinstance(found, Deferred)
    y = read(found)
    assert_close(y.detach(), 2 * REAL)
    (y * torch.arange(4.0).view(2, 2)).sum().backward()  # type: ignore[no-untyped-call]
    assert_close(values.grad, torch.tensor([0.0, 6.0, 2.0]))


def test_transforms_read_alpha() -> None:
    def twice(values: Tensor) -> Tensor:
        return (alpha_of(values).square() * torch.arange(1.0, 5.0).view(2, 2)).sum()

    gradient = torch.func.grad(twice)(VALUES)
    assert_close(gradient, torch.tensor([2.0, 16.0, 0.0]))
    stacked = torch.stack((VALUES, 2 * VALUES))
    assert_close(torch.func.vmap(alpha_of)(stacked), torch.stack((REAL, 2 * REAL)))
    assert_close(torch.func.vmap(torch.func.grad(twice))(stacked)[1], 2 * gradient)
    moved = torch.func.jvp(alpha_of, (VALUES,), (torch.ones(3),))[1]
    assert moved.tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_a_layer_on_the_kernels_reads_no_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Deferred] = []
    of = Deferred.of

    def watched(*how: Any) -> Deferred:
        made.append(of(*how))
        return made[-1]

    monkeypatch.setattr(Deferred, "of", watched)
    model = nn.Linear(16, 16)
    params = {name: p.detach() for name, p in model.named_parameters()}
    masks = compute_masks(params, TopKastConfig(forward_sparsity=0.7))
    indexed, x = index_masks(model, masks), torch.randn(4, 16)
    y = sparse_forward(model, params, indexed, x)
    assert_close(y, sparse_forward(model, params, masks, x))
    assert made
    assert "content" not in vars(made[0])
