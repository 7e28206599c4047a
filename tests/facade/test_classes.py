"""Classes of sparse modules: what others put into them, and who hears of them."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import topkast_func as tk
from tests.facade.networks import CONFIG, perceptron


class Registered(nn.Module):
    """A base that keeps the classes derived from it, with what they are told."""

    known: dict[str, Any] = {}  # noqa: RUF012

    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        Registered.known[cls.__name__] = (cls, kind)


class Network(Registered, kind="network"):
    """A module of its own, made with an argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Double(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_registry_of_classes_does_not_hear_of_sparse_ones() -> None:
    model = Network(8)
    tk.sparsify(model, CONFIG)
    assert type(model) is not Network
    assert Registered.known["Network"] == (Network, "network")


def test_a_registry_of_classes_hears_of_those_that_users_derive() -> None:
    class Own(tk.TopKastLinear, Registered, kind="layer"):
        pass

    assert Registered.known.pop("Own") == (Own, "layer")


@pytest.mark.parametrize("make", [lambda: Network(8), lambda: nn.Linear(16, 8)])
def test_a_new_module_of_a_sparse_class_is_a_plain_one(make: Any) -> None:
    model = make()
    plain = type(model)
    tk.sparsify(model, CONFIG)
    new = type(model)(8) if plain is Network else type(model)(16, 8)
    assert type(new) is plain
    tk.sparsify(new, CONFIG)
    assert type(new) is type(model)
    for copied in (copy.deepcopy(model), model):
        assert torch.equal(copied(torch.ones(2, 16)), model(torch.ones(2, 16)))
        assert type(tk.densify(copied)) is plain


@pytest.mark.parametrize("before", [False, True])
def test_a_parametrization_that_came_later_is_to_be_removed_before_densify(before: bool) -> None:
    model, x = perceptron(), torch.randn(2, 16)
    if before:
        parametrize.register_parametrization(model[0], "bias", Double())
    plain = type(model[0])
    tk.sparsify(model, CONFIG)
    layer = model[2]
    parametrize.register_parametrization(layer, "bias", Double())
    held, expected = copy.deepcopy(model.state_dict()), model(x)
    for use in (tk.densify, tk.sparse_module):
        with pytest.raises(ValueError, match=r"'2' got a parametrization after"):
            use(model)
    torch.testing.assert_close(model.state_dict(), held, rtol=0, atol=0)
    assert torch.equal(model(x), expected)
    parametrize.remove_parametrizations(layer, "bias")
    torch.testing.assert_close(tk.densify(model)(x), expected)
    assert type(model[0]) is plain


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("key", ["bias", "weight"])
def test_a_parametrization_that_came_before_is_to_be_removed_after_densify(
    key: str, leave: bool
) -> None:
    model, x = perceptron(), torch.randn(2, 16)
    parametrize.register_parametrization(model[0], key, Double())
    tk.sparsify(model, replace(CONFIG, sparse=("*weight*",)))
    held, expected = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(ValueError, match=f"^'{key}' was parametrized before tk.sparsify, "):
        parametrize.remove_parametrizations(model[0], key, leave_parametrized=leave)
    torch.testing.assert_close(model.state_dict(), held, rtol=0, atol=0)
    assert torch.equal(model(x), expected)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    tk.densify(model)
    parametrize.remove_parametrizations(model[0], key)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


REMOVALS: dict[str, tuple[Any, Any, str]] = {
    "weight norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm, "weight_v"),
    "spectral norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "weight_orig"),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.1),  # type: ignore[no-untyped-call]
        lambda layer: prune.remove(layer, "weight"),  # type: ignore[no-untyped-call]
        "weight_orig",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(("name", "case"), REMOVALS.items(), ids=REMOVALS)
def test_what_computes_a_weight_from_a_sparse_one_is_to_be_removed_after_densify(
    name: str, case: tuple[Any, Any, str]
) -> None:
    apply, remove, key = case
    model, x = perceptron().eval(), torch.randn(2, 16)
    apply(model[0])
    tk.sparsify(model, replace(CONFIG, sparse=f"0.{key}"))
    held, expected = copy.deepcopy(model.state_dict()), model(x)
    told = f"^'{key}' was part of a {name} before tk.sparsify, .* tk.densify the model, remove the"
    with pytest.raises(ValueError, match=told):
        remove(model[0])
    torch.testing.assert_close(model.state_dict(), held, rtol=0, atol=0)
    assert torch.equal(model(x), expected)
    tk.densify(model)
    expected = model(x)
    remove(model[0])
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("case", REMOVALS.values(), ids=REMOVALS)
def test_what_computes_a_weight_that_is_not_sparse_is_removed(case: tuple[Any, Any, str]) -> None:
    apply, remove, _ = case
    model, x = perceptron().eval(), torch.randn(2, 16)
    apply(model[0])
    tk.sparsify(model, replace(CONFIG, sparse="2.weight"))
    expected = model(x)
    remove(model[0])
    torch.testing.assert_close(model(x), expected)
    assert type(tk.densify(model)[0]) is nn.Linear


@pytest.mark.parametrize("first", [True, False])
def test_sets_that_a_shallow_copy_took_along_are_missed_by_name(first: bool) -> None:
    layer = nn.Linear(16, 8)
    tk.sparsify(layer, tk.TopKastConfig(0.75, 0.5))
    pair, x = [layer, copy.copy(layer)], torch.ones(2, 16)
    assert torch.equal(pair[0](x), pair[1](x))
    tk.densify(pair.pop(not first))
    with pytest.raises(RuntimeError, match=r"'weight' has no sets any more, .* copy\.deepcopy"):
        pair[0](x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_script_is_refused_with_the_ways_on() -> None:
    model = perceptron()
    tk.sparsify(model, CONFIG)
    with pytest.raises(TypeError, match=r"script does not compile a sparse Sequential: .*densify"):
        torch.jit.script(model)
    torch.jit.script(tk.densify(model))


def test_a_layer_that_is_parametrized_before_and_after_is_named() -> None:
    layer = nn.Linear(16, 8)
    parametrize.register_parametrization(layer, "bias", Double())
    layer.register_parameter("scale", nn.Parameter(torch.ones(3)))
    tk.sparsify(layer, tk.TopKastConfig(0.75, 0.5, sparse="weight"))
    parametrize.register_parametrization(layer, "scale", Double())
    with pytest.raises(ValueError, match=r"'model' got a parametrization after"):
        tk.densify(layer)
    parametrize.remove_parametrizations(layer, "scale")
    assert torch.equal(layer.get_parameter("scale"), torch.full((3,), 2.0))
    tk.densify(layer)


def test_a_seed_layer_with_a_parametrized_bias_is_named() -> None:
    layer = tk.TopKastLinear(16, 8, 0.75, 0.5)
    parametrize.register_parametrization(layer, "bias", Double())
    with pytest.raises(ValueError, match="got a parametrization after"):
        tk.densify(layer)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("case", REMOVALS.values(), ids=REMOVALS)
def test_what_the_outermost_module_computes_before_its_forward_pass_is_refused(
    case: tuple[Any, Any, str],
) -> None:
    apply, _, key = case
    layer, x = nn.Linear(16, 5).eval(), torch.randn(2, 16)
    apply(layer)
    config = replace(CONFIG, sparse=f"*{key}", keep_dense=())
    with pytest.raises(ValueError, match=rf"^\['{key}'\] cannot be sparse: .*Sequential\(model\)"):
        tk.sparsify(layer, config)
    assert type(layer) is nn.Linear
    model = nn.Sequential(layer)
    tk.sparsify(model, config)
    expected = model(x)
    torch.testing.assert_close(tk.densify(model)(x), expected)
