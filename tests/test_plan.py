"""What a training is planned to take, beside what it takes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import topkast_func as tk
from benchmarks import record
from benchmarks.networks import problem
from benchmarks.page import linear
from topkast_func.distributed.batches import rows
from topkast_func.distributed.owners import Owners
from topkast_func.distributed.ranks import Ranks
from topkast_func.training.parts import part

CONFIG, ADAM = tk.TopKastConfig(0.9, 0.8), tk.adamw(0.01)
GIGA = 1e9


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _network() -> nn.Sequential:
    layers = (nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(32, 300))
    model = nn.Sequential(*layers, nn.Linear(300, 2500), nn.Linear(2500, 4))
    model[-1].bias.requires_grad_(False)
    return model


CONFIGS = {
    "entries": {},
    "blocks": {"block_shape": (4, 4), "sparse": ("4.weight", "5.weight")},
    "erk": {"allocation": "erk"},
    "dense": {"method": tk.dense()},
    "powers": {"powerprop": 2.0},
    "settled": {"explore_until": 0},
}
OPTIMIZERS = [ADAM, tk.sgd(0.1), tk.chain(tk.clip_by_global_norm(1.0), tk.lion(0.01))]


@pytest.mark.parametrize("master", [None, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_state_that_training_begins_with(
    name: str, optimizer: tk.Optimizer, master: Any
) -> None:
    options: Any = CONFIGS[name]
    config, model = tk.TopKastConfig(0.9, 0.8, **options), _network()
    plan = tk.plan(model.to("meta"), config, 4, optimizer, master=master)
    for layout in plan.layouts:
        if layout.options is None or layout.shard:
            continue
        state = tk.init_state(_network(), config, optimizer, master=master, **layout.options)
        gradients = _bytes(state.weights.values)
        held = (state.weights, state.buffers, state.frozen, state.optimizer.slots)
        assert layout.device + layout.host == _bytes(held) + gradients
        if layout.host:
            assert layout.host == _bytes(state.weights.theta)
        buffers = sum(state.buffers[name].nbytes for name in ("1.running_mean", "1.running_var"))
        assert layout.sent == 2 * (gradients + buffers) * 3 // 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_owners_are_those_of_the_part_with_most(
    name: str, optimizer: tk.Optimizer
) -> None:
    options: Any = CONFIGS[name]
    config = tk.TopKastConfig(0.9, 0.8, **options)
    for layout in tk.plan(_network().to("meta"), config, 3, optimizer).layouts:
        if not layout.shard:
            continue
        assert layout.options is not None
        state = tk.init_state(_network(), config, optimizer, **layout.options)
        parts = [part(_rank(rank, 3), config, state) for rank in range(3)]
        assert [*parts[0].split] == ([] if name == "blocks" else ["4.weight"])
        split = [[part.theta for part in own.split.values()] for own in parts]
        theta = [
            _here((own.weights.theta, rest)) if layout.host else 0
            for own, rest in zip(parts, split, strict=True)
        ]
        gradients = _bytes(state.weights.values)
        held = [
            (
                own.weights,
                own.buffers,
                own.frozen,
                own.optimizer.slots,
                rest,
                [part.slots for part in own.split.values()],
            )
            for own, rest in zip(parts, split, strict=True)
        ]
        numbers = [_here(h) + gradients - t for h, t in zip(held, theta, strict=True)]
        assert (layout.device, layout.host) == (max(numbers), max(theta))


def _here(tree: Any) -> int:
    """Return the bytes that are not with other ranks."""
    return _bytes(tree_map_only(Tensor, lambda t: None if t.is_meta else t, tree))


def _rank(rank: int, size: int) -> Owners:
    ranks = Ranks(None)
    ranks.rank, ranks.size = rank, size
    return Owners(ranks, rows, ())


MEASURED = {
    "DDP": "dense model, DDP",
    "FSDP2": "dense model, FSDP2",
    "topkast": "compact",
    "topkast owners": "owners",
}


def _measured() -> dict[tuple[str, int, tuple[int, int]], dict[str, float]]:
    """Return what the benchmarks have measured, by way, ranks and blocks, of each task."""
    found: dict[tuple[str, int, tuple[int, int]], dict[str, float]] = {}
    for entry in (e for e in record.load().entries if e["suite"] == "ranks"):
        told, number = entry["parameters"], record.median(entry)
        block: Any = tuple(told.get("block_shape", (1, 1)))
        found.setdefault((told["way"], told["ranks"], block), {})[entry["task"]] = number
    return found


def test_what_is_planned_is_what_was_measured() -> None:
    model, measured = problem("mlp-1024").model, _measured()
    assert {ranks for _, ranks, _ in measured} == {2, 4}
    for (way, ranks, block), found in measured.items():
        config = tk.TopKastConfig(0.9, 0.8, block_shape=block)
        (layout,) = (o for o in tk.plan(model, config, ranks).layouts if o.name == MEASURED[way])
        assert layout.device == pytest.approx(found["held"], rel=1e-3)
        scattered = 4 / 3 if way == "FSDP2" else 1  # gloo sums where a ring would scatter
        assert ranks * layout.sent * scattered == pytest.approx(found["sent in a step"], rel=0.02)


def test_fsdp_needs_less_memory_from_the_ranks_on_that_the_table_says() -> None:
    model = linear(0.012, 1000)
    for block in ((1, 1), (10, 10)):
        config = tk.TopKastConfig(0.9, 0.8, block_shape=block)
        plan = tk.plan(model, config, 2)
        first = int(plan.notes[0].split()[-3])
        assert 2 < first < 12
        for ranks in range(1, 16):
            *own, _, fsdp = tk.plan(model, config, ranks).layouts
            assert (fsdp.device < min(layout.device for layout in own)) == (ranks >= first)


def test_a_tensor_that_bounds_what_owners_spare_is_named() -> None:
    model = {"0.weight": torch.empty(64, 64), "1.weight": torch.empty(128, 64)}
    assert len(tk.plan(model, CONFIG, 2).notes) == 1
    config = replace(CONFIG, method=tk.static())
    assert len(tk.plan(model, config, 1).notes) == 1
    assert tk.plan(model, config, 2).notes[1:] == [
        "owners: 1.weight is more than 1/2 of all entries, and with method=Static() no sparse "
        "tensor is split: further ranks spare its owner nothing"
    ]
    two, three = (tk.plan(model, config, ranks).layouts[2] for ranks in (2, 3))
    assert two.device == three.device
    assert three.device > tk.plan(model, CONFIG, 3).layouts[2].device


def test_a_dense_model_takes_what_torch_does() -> None:
    model = _network()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(2, 1, 10)).square().sum().backward()
    optimizer.step()
    slots = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    frozen = _bytes([p for p in model.parameters() if p.grad is None])
    rest = _bytes([*model.buffers()]) + frozen
    trained = _bytes([*model.parameters(), slots, gradients]) - frozen
    *_, ddp, fsdp = tk.plan(model, CONFIG, 4).layouts
    assert ddp[1:4] == (trained + rest, 0, 2 * (_bytes(gradients) + 32) * 3 // 4)
    assert fsdp[1:4] == (-(-trained // 4) + rest, 0, 3 * _bytes(gradients) * 3 // 4)


SIZES = [
    (1, 4096, 8, (4.8, 4.0, 1.4), (16.0, 0.0, 7.0), (2.0, 0.0, 10.5)),
    (7, 16384, 8, (34.0, 28.0, 9.8), (112.0, 0.0, 49.0), (14.0, 0.0, 73.5)),
    (100, 32768, 64, (480.0, 400.0, 158.0), (1600.0, 0.0, 788.0), (25.0, 0.0, 1181.0)),
]


@pytest.mark.parametrize(("billions", "width", "ranks", "ours", "ddp", "fsdp"), SIZES)
def test_a_model_that_fits_no_machine_is_planned(
    billions: float, width: int, ranks: int, ours: Any, ddp: Any, fsdp: Any
) -> None:
    plan = tk.plan(linear(billions, width), CONFIG, ranks)
    print(plan)
    found = {layout.name: [n / GIGA for n in layout[1:4]] for layout in plan.layouts}
    assert found["compact, θ on the host"] == pytest.approx(ours, rel=0.03)
    assert found["dense model, DDP"] == pytest.approx(ddp, rel=0.03)
    assert found["dense model, FSDP2"] == pytest.approx(fsdp, rel=0.03)
    assert plan.notes == [
        "dense model, FSDP2: takes less of a device than any other from 5 ranks on"
    ]


def test_the_first_layout_that_fits_is_chosen() -> None:
    model = linear(0.1, 2048)
    sizes = {layout.name: layout.device for layout in tk.plan(model, CONFIG, 2).layouts}
    for memory, name in [
        (sizes["compact"], "compact"),
        (sizes["compact"] - 1, "compact, θ on the host"),
        (sizes["compact, θ on the host"] - 1, "owners, θ on the host"),
        (sizes["owners, θ on the host"] - 1, None),
    ]:
        plan = tk.plan(model, CONFIG, 2, memory=memory)
        assert (plan.choice and plan.choice.name) == name
    assert tk.plan(model, CONFIG, 2).choice == tk.plan(model, CONFIG, 2).layouts[0]


def test_a_table_is_printed() -> None:
    plan = tk.plan(linear(1, 4096), CONFIG, 8, memory=5 * 10**9)
    assert repr(plan).splitlines() == [
        "bytes of each of 8     device  host sent a step fits",
        "compact                 8.94G     0       1.41G   no",
        "compact, θ on the host  4.91G 4.03G       1.41G  yes",
        "owners                  4.05G     0        1.1G  yes",
        "owners, θ on the host   3.51G  537M        1.1G  yes",
        "dense storage           18.1G     0       7.05G   no",
        "dense model, DDP        16.1G     0       7.05G   no",
        "dense model, FSDP2      2.01G     0       10.6G  yes",
        "dense model, FSDP2: takes less of a device than any other from 5 ranks on",
    ]


def test_a_rank_alone_sends_nothing_and_what_is_not_elementwise_is_dense() -> None:
    init = ADAM.init
    rows = tk.Optimizer(init, ADAM.update, ADAM.learning_rate, elementwise=False, name="rows")
    plan = tk.plan({"weight": torch.empty(64, 64)}, CONFIG, 1, rows)
    assert [layout.sent for layout in plan.layouts] == [0, 0, 0]
    assert plan.layouts[0].name == "dense storage"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"world_size": 2.0}, TypeError, "world_size must be an integer"),
        ({"memory": 0}, ValueError, "memory must be at least 1, got 0"),
        ({"optimizer": torch.optim.Adam}, TypeError, "optimizer must be what"),
        ({"model": nn.ReLU()}, ValueError, "there is no parameter that requires a gradient"),
        ({"model": 3}, TypeError, "params must map names to tensors, got int"),
    ],
)
def test_bad_input_is_named(change: Any, error: type[Exception], message: str) -> None:
    usual = {"model": nn.Linear(20, 20), "config": CONFIG, "world_size": 2}
    with pytest.raises(error, match=message):
        tk.plan(**(usual | change))


def test_fsdp_takes_less_than_any_other_from_two_ranks_on_at_the_earliest() -> None:
    told = str(tk.plan(nn.Linear(256, 256), tk.TopKastConfig(0.5), 1))
    assert "FSDP2: takes less of a device than any other from 2 ranks on" in told
