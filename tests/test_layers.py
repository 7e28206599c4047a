"""Layers on the kernels for a while: which they are, what they compute, how they are after."""

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from tests.kernels.problems import Problem, integers, problem
from topkast_func.model.layers import bound_to, kernel_weights, stand_ins, standing_in


class Sub(nn.Linear):
    """Computes as a linear layer does."""


class Other(nn.Linear):
    """Computes as it likes."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def overridden() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    vars(model[0]).update(forward=lambda x: x)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def tied_to_an_embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    return model


def gpt2_linear(outputs: int, inputs: int) -> nn.Module:
    layer: nn.Module = Conv1D(outputs, inputs)  # type: ignore[no-untyped-call]
    return layer


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Linear(3, 2), ["weight"]),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2))),
            ["0.weight", "1.0.weight"],
        ),
        (nn.Sequential(nn.Conv1d(3, 3, 1, groups=3), nn.Embedding(3, 3), nn.Bilinear(2, 2, 2)), []),
        (nn.Sequential(Sub(3, 2), Other(2, 2)), ["0.weight"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (nn.MultiheadAttention(4, 2, kdim=3), []),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), []),
        (gpt2_linear(3, 2), ["weight"]),
        (tied(), ["0.weight", "2.weight"]),
        (tied_to_an_embedding(), ["0.weight"]),
        (shared(), ["0.weight"]),
        (overridden(), []),
        (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))), []),
        (lambda params, x: x, []),
        (None, []),
    ],
)
def test_weights_of_linear_maps_are_for_kernels(model: Any, names: list[str]) -> None:
    assert list(kernel_weights(model)) == names


def layer_of(given: Problem, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(given.shape[1], given.shape[0], bias=bias))


@contextlib.contextmanager
def on_kernels(model: nn.Module, given: Problem) -> Iterator[dict[str, Tensor]]:
    """Yield the weight that stands for the values; it is zero, to tell one from the other."""
    name, alpha = "0.weight", torch.zeros(given.shape)
    layers = stand_ins(model, "reference")
    tensors = ({name: alpha}, {name: given.values}, {name: given.pattern})
    with standing_in(layers), bound_to(layers, *tensors):
        yield {name: alpha}


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_the_values_it_is_bound_to(
    block: tuple[int, int], bias: bool
) -> None:
    given = problem(block)
    model = layer_of(given, bias)
    offset, x = integers(given.shape[0]), integers(5, given.shape[1])
    with on_kernels(model, given) as weight:
        tensors = {**weight, **({"0.bias": offset} if bias else {})}
        y: Tensor = functional_call(model, tensors, (x,))
    assert torch.equal(y, x @ given.alpha.T + (offset if bias else 0))


def test_a_layer_that_is_given_another_weight_computes_with_that() -> None:
    given = problem()
    model, x = layer_of(given), torch.randn(5, given.shape[1])
    expected, other = model(x), torch.randn(given.shape)
    with on_kernels(model, given):
        assert torch.equal(model(x), expected)
        y: Tensor = functional_call(model, {"0.weight": other, "0.bias": torch.zeros(1)}, (x,))
    torch.testing.assert_close(y, x @ other.T)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_meanwhile_computes_with_its_own_weight(copied: Any) -> None:
    given = problem()
    model, x = layer_of(given), torch.randn(5, given.shape[1])
    expected = model(x)
    with on_kernels(model, given):
        other = copied(model)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.zero_()
    assert not other(x).any()
    assert torch.equal(model(x), expected)


def test_a_layer_keeps_its_hooks() -> None:
    given = problem()
    model = layer_of(given, bias=False)
    model[0].register_forward_hook(lambda module, inputs, y: 3 * y)
    x = integers(5, given.shape[1])
    with on_kernels(model, given) as weight:
        y: Tensor = functional_call(model, weight, (x,))
    assert torch.equal(y, 3 * x @ given.alpha.T)


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_has_the_same_parts_meanwhile_and_is_after_what_it_was(fails: bool) -> None:
    given = problem()
    model = layer_of(given)
    modules, state = dict(model.named_modules()), dict(model.state_dict())
    held, x = dict(vars(model[0])), torch.randn(2, given.shape[1])
    expected = model(x)
    with contextlib.suppress(RuntimeError), on_kernels(model, given):
        assert vars(model[0]).keys() != held.keys()
        assert dict(model.named_modules()) == modules
        assert model.state_dict().keys() == state.keys()
        if fails:
            raise RuntimeError("in the middle")
    assert vars(model[0]).keys() == held.keys()
    assert torch.equal(model(x), expected)


HEADS, LENGTH = 2, 5
BANNED = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDED = torch.arange(LENGTH) > torch.tensor([[2], [4], [9]])
MASKS: list[dict[str, Any]] = [
    {},
    {"attn_mask": BANNED},
    {"attn_mask": BANNED, "is_causal": True},
    {"attn_mask": torch.randn(LENGTH, LENGTH)},
    {"attn_mask": torch.randn(3 * HEADS, LENGTH, LENGTH)},
    {"key_padding_mask": PADDED},
    {"key_padding_mask": PADDED, "attn_mask": BANNED, "is_causal": True},
    {"key_padding_mask": torch.randn(3, LENGTH), "attn_mask": torch.randn(LENGTH, LENGTH)},
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "+".join(mask) or "none")
def test_attention_to_oneself_is_that_of_the_layer_on_the_kernels(
    batch_first: bool, dropout: float, mask: dict[str, Any]
) -> None:
    given = problem(grid=(24, 8))
    layer = nn.MultiheadAttention(8, HEADS, dropout=dropout, batch_first=batch_first)
    x = torch.randn(3, LENGTH, 8) if batch_first else torch.randn(LENGTH, 3, 8)
    name, zeros, scale = "in_proj_weight", torch.zeros(given.shape), 0.1
    layers = stand_ins(layer, "reference")
    tensors = ({name: zeros}, {name: scale * given.values}, {name: given.pattern})
    torch.manual_seed(1)
    with standing_in(layers), bound_to(layers, *tensors):
        y, weights = functional_call(
            layer, {name: zeros}, (x, x, x), mask | {"need_weights": False}
        )
    torch.manual_seed(1)
    alpha = {name: scale * given.alpha}
    expected, _ = functional_call(layer, alpha, (x, x, x), mask | {"need_weights": False})
    assert weights is None
    assert expected.any()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("asked", ["weights", "another", "unbatched"])
def test_attention_that_the_stand_in_does_not_know_is_that_of_the_layer(asked: str) -> None:
    layer = nn.MultiheadAttention(8, HEADS, batch_first=True)
    x = torch.randn(3, LENGTH, 8) if asked != "unbatched" else torch.randn(LENGTH, 8)
    other = torch.randn_like(x) if asked == "another" else x
    expected = layer(x, other, other, need_weights=asked == "weights")
    with standing_in(stand_ins(layer)):
        found = layer(x, other, other, need_weights=asked == "weights")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
