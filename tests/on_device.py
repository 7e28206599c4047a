"""What is to be right on a device: on one that is pretended here, and on a GPU where one is.

`checks` need neither pytest nor Hypothesis, so that ``python -m benchmarks gpu`` runs them too.
Networks are in float64, in which sums in another order choose no other sets; the tensors and the
sets are those of the CPU, the sets to the last index.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import topkast_func as tk
from tests.kernels.problems import integers, problem, products
from topkast_func.kernels import pattern_of, sparse_linear
from topkast_func.kernels.pattern import flattened

METHODS = [
    tk.topkast(),
    tk.topkast("threshold"),
    tk.topkast("value", exchange=None),
    tk.random_backward(),
    tk.ste(),
    tk.gmp(0, 4, 2),
    tk.static(),
    tk.set(),
    tk.rigl(),
]
CROSSED = (tk.topkast(), tk.rigl())
OPTIMIZERS = [
    tk.sgd(0.1, momentum=0.9),
    tk.adamw(lambda step: 0.1 / (1 + step)),
    tk.lion(torch.tensor(0.01)),
    tk.chain(tk.clip_by_global_norm(1.0), tk.adam(0.01)),
    tk.multi_steps(tk.sgd(0.1), 2),
    tk.partition({"*bias": tk.sgd(0.1), "*": tk.adam(0.01)}),
]
KINDS = [("compact", None), ("dense", "1:4"), ("compact", "1:4"), ("dense", None)]
"""Storages and patterns."""

SETS: list[Any] = [{}, {"block_shape": (16, 16)}, {"pattern": "1:4"}]
OPTIONS: list[Any] = [{"block_shape": (4, 4), "keep_dense": "1.weight"}, {"powerprop": 2.0}]
PRODUCTS = [
    *((torch.bfloat16, side, 37) for side in (64, 32, 128, 16, 48)),
    (torch.bfloat16, 32, 1),
    (torch.bfloat16, 32, 300),
    (torch.float16, 32, 37),
    (torch.float32, 32, 37),
]
STEPS = [
    ("compact", 32, torch.bfloat16),
    ("compact", 32, torch.float16),
    ("compact", 1, torch.float32),
    ("dense", 1, torch.bfloat16),
]
COMPILE: Any = True

Run: TypeAlias = tuple[tk.TrainState, tk.StepMetrics]
Checks: TypeAlias = Iterator[tuple[str, Callable[[], None]]]


def kinds(method: tk.Method) -> list[Any]:
    """Return all storages and patterns for some methods, for others each once."""
    return KINDS if method in CROSSED else KINDS[:2]


def checks(device: torch.device) -> Checks:
    """Yield what raises where something is wrong, by name."""
    for case in PRODUCTS:
        yield "products {} {} {}".format(*case), partial(check_products, device, *case)
    for number, method in enumerate(METHODS):
        yield f"sets {number} {method}", partial(check_sets, device, method)
        for kind in kinds(method):
            name = "training {} {} {} {}".format(number, method, *kind)
            yield name, partial(check_training, device, method, *kind)
    for number, optimizer in enumerate(OPTIMIZERS):
        for storage in ("compact", "dense"):
            name = f"optimizer {number} {storage}"
            yield name, partial(check_training, device, tk.topkast(), storage, None, optimizer)
    for options in OPTIONS:
        check = partial(check_training, device, tk.topkast(), "compact", None, **options)
        yield f"options {options}", check
    yield "random numbers", partial(check_random_numbers, device)
    for storage in ("compact", "dense"):
        yield f"files {storage}", partial(check_files, device, storage)
    for method in CROSSED:
        yield f"facade {method}", partial(check_facade, device, method)


def compiled_checks(device: torch.device) -> Checks:
    """Yield what is compiled, which no pretended device is."""
    for case in STEPS:
        yield "steps {} {} {}".format(*case), partial(check_steps, device, *case)


def check_products(device: torch.device, dtype: torch.dtype, side: int, batch: int) -> None:
    """Compare products of small integers, which are exact, with those of the engine "reference"."""
    given = problem((side, side), dtype, grid=(3, 4))
    g, x = (integers(batch, n, dtype=dtype) for n in given.shape)
    exact = given._replace(theta=given.theta.double())
    expected = products("reference", exact, x.double(), g.double())
    there = given.on(device)
    name: Any = "triton" if device.type == "cuda" else "dense"
    found = products(name, there, x.to(device), g.to(device))
    same(found, tuple(tensor.to(dtype) for tensor in expected))
    if name == "triton" or dtype == torch.float32:  # else sums are rounded before a bias is added
        bias = integers(given.shape[0], dtype=dtype)
        leaves = (x.to(device), there.values, there.pattern, given.shape, bias.to(device))
        same((sparse_linear(*leaves, name),), ((expected[0] + bias).to(dtype),))


def check_sets(device: torch.device, method: tk.Method) -> None:
    """Compare the sets of a weight with ties, and their patterns."""
    theta = torch.randn(96, 64).mul(4).round()
    for options in SETS:
        config = tk.TopKastConfig(0.75, 0.5, method=method, **options)
        found, expected = (
            tk.compute_masks({"weight": leaf}, config)["weight"]
            for leaf in (theta.to(device), theta)
        )
        patterns = (pattern_of(*sets, config.block_shape) for sets in (found, expected))
        same(found, expected)
        same(*map(flattened, patterns))


def check_training(
    device: torch.device,
    method: tk.Method,
    storage: Any,
    pattern: str | None,
    optimizer: tk.Optimizer = OPTIMIZERS[1],
    **options: Any,
) -> None:
    """Compare a training with that of the CPU."""
    config = config_of(method, pattern=pattern, **options)
    expected = run("cpu", config, optimizer, storage=storage)
    found = run(device, config, optimizer, storage=storage)
    assert not elsewhere(found, device)
    same(found, expected)


def check_random_numbers(device: torch.device) -> None:
    """Compare a training with itself, and with one that drops nothing."""
    config, optimizer = config_of(tk.topkast()), tk.sgd(0.1)
    (one, told), (again, _), (_, without) = (
        run(device, config, optimizer, 3, dropout=share) for share in (0.5, 0.5, 0.0)
    )
    same(one, again)
    assert abs(float(told.loss) - float(without.loss)) > 1e-3
    assert not elsewhere(one, device)


def check_files(device: torch.device, storage: Any) -> None:
    """Read a state, save it, load it and go on."""
    config, optimizer = config_of(tk.topkast()), tk.adam(0.01)
    expected, _ = run("cpu", config, optimizer, 3, storage=storage)
    state, _ = run(device, config, optimizer, 3, storage=storage)
    for read in (tk.dense_params, tk.forward_params, tk.masks_of):
        assert not elsewhere(read(state), device)
        same(read(state), read(expected))
    with tempfile.TemporaryDirectory() as folder:
        tk.save(state, Path(folder) / "state", config)
        loaded = tk.load(
            Path(folder) / "state", model=network(), optimizer=optimizer, device=device
        )
    assert not elsewhere(loaded, device)
    same(tk.dense_params(loaded), tk.dense_params(expected))
    same(loaded.optimizer, expected.optimizer)
    train_step = step_of(network().to(device), config, optimizer)
    (after, metrics), (other, told) = (
        train_step(start, batch(device)) for start in (loaded, state)
    )
    same((tk.dense_params(after), metrics), (tk.dense_params(other), told))
    assert tk.summary(state).rows
    with redirect_stdout(StringIO()):
        assert tk.explain(state)


def check_facade(device: torch.device, method: tk.Method) -> None:
    """Compare an ordinary loop of torch with that of the CPU."""
    found, expected = (sparsified(where, config_of(method), 4).model for where in (device, "cpu"))
    assert not elsewhere(found.state_dict(), device)
    same(found.state_dict(), expected.state_dict())
    tk.densify(found)


def check_steps(device: torch.device, storage: Any, side: int, dtype: torch.dtype) -> None:
    """Compare compiled steps with eager ones, of which a plain one does not wait."""
    layers = (nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
    model = nn.Sequential(*layers).to(device, dtype)
    config = tk.TopKastConfig(0.7, 0.4, block_shape=(side, side), refresh_every=3)
    optimizer, x = tk.sgd(10.0), torch.randn(48, 128).to(device, dtype)
    engine: Any = "triton" if device.type == "cuda" and side > 1 else "auto"
    ends = []
    for compile in (False, COMPILE):
        step = tk.make_train_step(model, energy, config, optimizer, compile=compile, engine=engine)
        state = tk.init_state(model, config, optimizer, storage=storage)
        for number in range(6):
            may_wait = compile or number not in (1, 2)  # it refreshes before the next
            with nullcontext() if may_wait else unwaited(device):
                state, _ = step(state, x)
            if number == 2:  # later, sets that are chosen from rounded numbers may differ
                ends.append(tk.dense_params(state))
    for name, start in model.named_parameters():
        before, a, b = (tensor.float() for tensor in (start, ends[0][name], ends[1][name]))
        rounding = 4 * torch.finfo(dtype).eps * a.abs().max()
        assert (a - before).abs().max() > 2 * rounding, f"{name} stays where it is"
        assert (a - b).abs().max() <= rounding, f"{name}: compiled and eager steps differ"


def energy(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the mean square of what a model returns: a loss without targets."""
    return apply(x).float().square().mean()


@contextmanager
def unwaited(device: torch.device) -> Iterator[None]:
    """Let a GPU raise where the host waits for it."""
    mode = torch.cuda.set_sync_debug_mode if device.type == "cuda" else str
    mode("error")
    try:
        yield
    finally:
        mode("default")


def network(dropout: float = 0.0) -> nn.Module:
    """Build a small network in float64, in which no gradient is zero but for rounding."""
    torch.manual_seed(0)
    first = (nn.BatchNorm1d(1), nn.Conv1d(1, 4, 5), nn.Flatten(), nn.Linear(48, 60))
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(60, 16), nn.Dropout(dropout)).double()


def mse(apply: Any, batch: Any) -> Tensor:
    """Return the mean squared error."""
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def batch(where: torch.device | str) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, *n, generator=generator).double() for n in ((1, 16), (16,)))
    return x.to(where), y.to(where)


def config_of(method: tk.Method, **options: Any) -> tk.TopKastConfig:
    """Configure refreshes before steps 2 and 4, the end of exploration at 5."""
    return tk.TopKastConfig(0.75, 0.5, refresh_every=2, explore_until=5, method=method, **options)


def step_of(model: nn.Module, config: tk.TopKastConfig, optimizer: tk.Optimizer) -> Any:
    """Make a step that sums in one order on every device but a GPU."""
    engine = engine_on(next(model.parameters()).device)
    return tk.make_train_step(model, mse, config, optimizer, compile=False, engine=engine)


def engine_on(device: torch.device | str) -> Any:
    """Name what networks here are computed by."""
    return "auto" if torch.device(device).type == "cuda" else "reference"


def run(
    where: torch.device | str,
    config: tk.TopKastConfig,
    optimizer: tk.Optimizer,
    steps: int = 6,
    dropout: float = 0.0,
    **options: Any,
) -> Run:
    """Train a network on a device."""
    model = network(dropout).to(where)
    state = tk.init_state(model, config, optimizer, **options)
    train_step = step_of(model, config, optimizer)
    for _ in range(steps):
        state, metrics = train_step(state, batch(where))
    return state, metrics


def sparsified(
    where: torch.device | str,
    config: tk.TopKastConfig,
    steps: int,
    before: Callable[[], Any] = int,
) -> tk.Sparsifier:
    """Train a network by an optimiser of torch; call what is given before each other step."""
    model = network().to(where)
    sparsifier = tk.sparsify(model, config, engine=engine_on(where))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = batch(where)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y) + sparsifier.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        before()
        sparsifier.step()
    return sparsifier


def same(found: Any, expected: Any) -> None:
    """Compare trees of tensors: numbers to the last bit, but on a GPU, which adds as it likes."""
    for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        exact = not (ours.is_cuda and ours.dtype == torch.float64)
        rounding = 0.0 if exact else 1e-9
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=rounding, atol=rounding)


def elsewhere(tree: Any, device: torch.device) -> int:
    """Count the tensors of more than a number that are not on a device."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim]
    return sum(leaf.device.type != device.type for leaf in leaves)
