"""What happens where a step cannot be compiled."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor import cpu_vec_isa

import topkast_func as tk
from topkast_func.training import compilation

CONFIG, OPTIMIZER = tk.TopKastConfig(), tk.sgd(0.1)


def mse(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


class Talking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        print("a batch of", len(x))
        return self.fc(x)


class Peeking(Talking):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if y.sum().item() > 0 else -y


def step_of(model: nn.Module, compile: Any) -> Callable[[], Any]:
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=compile)
    return lambda: train_step(state, (torch.randn(16, 6), torch.randn(16, 3)))


@pytest.mark.parametrize(("model", "culprit"), [(Talking, "print"), (Peeking, "item")])
def test_a_break_is_named_with_the_way_on(model: type[nn.Module], culprit: str) -> None:
    with pytest.raises(RuntimeError) as error:
        step_of(model(), compile=True)()
    assert "breaks the graph of train_step" in str(error.value)
    assert "compile={'fullgraph': False}" in str(error.value)
    assert "compile=False" in str(error.value)
    assert culprit in str(error.value)


@pytest.mark.parametrize(
    ("model", "compile"),
    [(Peeking, {"fullgraph": False}), (Talking, False), (Peeking, False)],
)
def test_the_way_on_works(model: type[nn.Module], compile: Any) -> None:
    state, metrics = step_of(model(), compile)()
    assert int(state.step) == 1
    assert torch.isfinite(metrics.loss)


def test_options_reach_torch_compile() -> None:
    with pytest.raises(RuntimeError, match="no_such_backend"):
        step_of(nn.Linear(6, 3), compile={"backend": "no_such_backend"})()


def test_a_torch_too_old_to_compile_runs_eager_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "COMPILES_FROM", "99.0")
    with pytest.warns(UserWarning, match=r"runs eager, .*: torch .* is too old, 99.0 is needed"):
        step = step_of(nn.Linear(6, 3), compile=True)
    assert int(step()[0].step) == 1


def test_without_a_compiler_the_step_runs_eager_with_one_warning() -> None:
    model = nn.Linear(6, 3)
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=True)
    batch = torch.randn(16, 6), torch.randn(16, 3)
    nowhere = {"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}
    with inductor.patch(nowhere):
        with pytest.warns(UserWarning, match=r"^train_step runs eager.*C\+\+ compiler") as told:
            state, _ = step(state, batch)
        state, _ = step(state, batch)
    assert len([one for one in told if "train_step" in str(one.message)]) == 1
    assert int(state.step) == 2


class Hooked(Talking):
    """A network with a hook that only one graph by autograd can call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.register_full_backward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_what_was_passed_is_not_what_is_advised() -> None:
    with pytest.raises(RuntimeError) as error:
        step_of(Hooked(), compile={"fullgraph": False})()
    assert "runs in eager mode, and not compiled: pass" in str(error.value)
    assert "fullgraph" not in str(error.value)
    assert int(step_of(Hooked(), compile=False)()[0].step) == 1


def test_a_failure_that_is_no_compiler_s_does_not_ask_for_one() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError

    with pytest.warns(UserWarning, match=r"torch.compile failed \(NotImplementedError\)$"):
        step_of(nn.Linear(6, 3), compile={"backend": backend})()


def test_out_of_memory_is_told_as_it_is() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        def run(*_: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        return run

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        step_of(nn.Linear(6, 3), compile={"backend": backend})()


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.fc(x)
        return self.kept


def test_a_tensor_that_is_kept_from_the_graph_is_told_of() -> None:
    step = step_of(Keeping(), compile={"backend": "aot_eager"})
    with pytest.warns(UserWarning, match="keeps a tensor where it is not passed on"):
        assert int(step()[0].step) == 1


@torch._dynamo.config.patch(disable=True)  # type: ignore[untyped-decorator]
def test_where_torch_compiles_nothing_the_step_runs_eager_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"runs eager, .*switched off \(TORCH_COMPILE_DISABLE\)"):
        assert step_of(nn.Linear(6, 3), True)()[1].loss > 0


@pytest.mark.parametrize(("compile", "asked"), [(True, 1), ({"backend": "eager"}, 0), (False, 0)])
def test_what_the_compiler_can_is_found_out_while_the_step_is_traced(
    compile: Any, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread asks, once in a process; that there is no compiler is said by who needs it."""
    threads = []

    def pick_vec_isa() -> None:
        threads.append(threading.current_thread())
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", pick_vec_isa)
    compilation._find_vectors.cache_clear()
    for _ in range(2):
        step_of(nn.Linear(6, 3), compile)
    if asked:
        compilation._find_vectors().join()
    assert len(threads) == asked
    assert threading.current_thread() not in threads
