"""Configurations as JSON and as pickles: every field and every method comes back."""

import json
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import topkast_func as tk

FIRST = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}

CONFIGS = {
    "default": tk.TopKastConfig(),
    "by pattern": tk.TopKastConfig({"a*": 0.9, "code": 0.95, "*": 0.1}, {"a*": 0.5, "*": 0.1}),
    "staged": tk.TopKastConfig(tk.staged({0: 0.5, 7: 0.9}), tk.cubic(0.1, 0.5, 3, 20)),
    "globs": tk.TopKastConfig(sparse=["a*", "ü[1]"], keep_dense=("b*", '"\\')),
    "one glob": tk.TopKastConfig(sparse="*"),
    "numbers": tk.TopKastConfig(1 / 3, 0.1, penalty_weight=1e-300, powerprop=2.5),
    "times": tk.TopKastConfig(refresh_every=None, explore_until=0),
    "intervals": tk.TopKastConfig(refresh_every={0: 1, 2000: None, 9: 7}),
    "half": tk.TopKastConfig({"a*": 0.9}, 0.2),
    "penalty": tk.TopKastConfig(penalty=None),
    "blocks": tk.TopKastConfig(block_shape=(4, 2), block_norm="l1"),
    "erk": tk.TopKastConfig(allocation="erk"),
    "densities": tk.TopKastConfig(allocation={"a*": 0.25}),
}
METHODS = {
    "topkast": tk.topkast("threshold", exchange=0.25),
    "random_backward": tk.random_backward("zero"),
    "ste": tk.ste(),
    "static": tk.static(),
    "set": tk.set(0.1),
    "rigl": tk.rigl(1 / 3),
    "gmp": tk.gmp(3, 50, stages=4),
    "dense": tk.dense(),
}
CONFIGS |= {name: tk.TopKastConfig(method=method) for name, method in METHODS.items()}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


@every_config
def test_a_configuration_comes_back_from_json(config: tk.TopKastConfig) -> None:
    again = tk.TopKastConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()
    assert {name: type(value) for name, value in vars(again).items()} == {
        name: type(value) for name, value in vars(config).items()
    }


@every_config
def test_a_configuration_comes_back_from_a_pickle(config: tk.TopKastConfig) -> None:
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config)


def test_what_comes_back_means_the_same() -> None:
    config = replace(CONFIGS["by pattern"], forward_sparsity={"a*": 0.9, "*b*": 0.1})
    config = replace(config, backward_sparsity={"a*": 0.5, "*b*": 0.1})
    for again in (pickle.loads(pickle.dumps(config)), tk.TopKastConfig.from_json(config.to_json())):
        assert tk.allocate(FIRST, again) == tk.allocate(FIRST, config)


def test_every_method_of_the_library_is_described() -> None:
    assert METHODS.keys() == {
        name for name in dir(tk.methods) if isinstance(_made(name), tk.Method)
    }


def _made(name: str) -> object:
    make = getattr(tk.methods, name)
    arguments = (0, 1) if name == "gmp" else ()
    return make(*arguments) if callable(make) and name.islower() else None


def test_the_json_is_what_a_person_would_write() -> None:
    config = tk.TopKastConfig(tk.staged({0: 0.5, 9: 0.9}), {"a": 0.1}, method=tk.rigl(0.5))
    description = json.loads(config.to_json())
    assert list(description) == list(vars(config))
    assert description["forward_sparsity"] == [[0, 0.5], [9, 0.9]]
    assert description["backward_sparsity"] == {"a": 0.1}
    assert description["method"] == {"name": "rigl", "drop_fraction": 0.5}
    assert description["block_shape"] == [1, 1]


def test_what_is_left_out_has_its_default() -> None:
    assert tk.TopKastConfig.from_json("{}") == tk.TopKastConfig()
    text = '{"method": {"name": "gmp", "begin": 1, "end": 9}, "sparse": "a*"}'
    assert tk.TopKastConfig.from_json(text) == tk.TopKastConfig(method=tk.gmp(1, 9), sparse="a*")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "must be a JSON object, got \\[\\]"),
        ('{"sparsity": 0.9}', r"TopKastConfig has no \['sparsity'\]; it has \['forward_sparsity'"),
        ('{"method": "rigl"}', r"method must be an object .*'rigl'.*, got 'rigl'"),
        (
            '{"method": {"name": "magic"}}',
            r"one of \['topkast', .*'dense'\].* got {'name': 'magic'}",
        ),
        ('{"method": {"name": []}}', "method must be an object"),
        ('{"method": {"name": "rigl", "drop": 1}}', r"rigl has no \['drop'\]; it has \['drop_fr"),
        ('{"method": {"name": "gmp"}}', "missing 2 required positional arguments"),
        ('{"method": {"name": "rigl", "drop_fraction": "all"}}', r"must be a number .* got 'all'"),
        ('{"forward_sparsity": [[0, 0.5], [1]]}', r"must be pairs \[step, number\]"),
        ('{"forward_sparsity": [[0.5, 0.5]]}', "step of staged must be an integer"),
        ('{"forward_sparsity": [[[], 0.5]]}', "unhashable"),
        (
            '{"forward_sparsity": [[0, 0.5], [0, 0.9]]}',
            r"forward_sparsity must give each step one number, got \[\[0, 0.5\], \[0, 0.9\]\]",
        ),
        ('{"refresh_every": [[0, 5], [9, 7], [9, 5]]}', "refresh_every must give each step one"),
        ('{"forward_sparsity": "0.9"}', "forward_sparsity must be a number"),
        ('{"forward_sparsity": NaN}', "forward_sparsity must be in .* got nan"),
        ('{"penalty_weight": 1%s}' % ("0" * 400), "too large"),
        ('{"refresh_every": true}', "refresh_every must be an integer of at least 1, got True"),
        ('{"block_shape": [1]}', "block_shape must be a pair"),
        ('{"sparse": {"code": "m.f"}}', "sparse is the code of m.f, which JSON cannot describe"),
    ],
)
def test_bad_json_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tk.TopKastConfig.from_json(text)


def _wide(name: str, tensor: Tensor) -> bool:
    return tensor.shape[-1] > 3


class _Wide:
    def __call__(self, name: str, tensor: Tensor) -> bool:
        return tensor.shape[-1] > 3


@dataclass(frozen=True)
class _Own(tk.Method):
    """A method of one's own."""

    drop_fraction: float = 7.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse": _wide}, r"sparse is the code of tests.test_config_json._wide, which JSON"),
        ({"sparse": lambda name, tensor: True}, r"sparse is the code of .*<lambda>"),
        ({"sparse": _Wide()}, r"sparse is the code of tests.test_config_json._Wide"),
        ({"method": _Own()}, r"method is the code of tests.test_config_json._Own"),
        ({"sparse": _wide, "method": _Own()}, r"sparse is the .*_wide and method is the .*_Own"),
    ],
)
def test_code_is_named_and_not_written(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tk.TopKastConfig(**fields).to_json()


def test_a_configuration_with_a_predicate_of_a_module_pickles() -> None:
    config = tk.TopKastConfig(sparse=_wide, method=_Own())
    assert pickle.loads(pickle.dumps(config)) == config
