"""What torchrun does after a rank is killed: all begin again, from the last checkpoint."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import topkast_func as tk
from tests.distributed.processes import FORKING
from tests.distributed.test_sharded import same
from topkast_func.distributed.launched import is_first, launched, world

CONFIG, ADAM = tk.TopKastConfig(0.75, 0.5, refresh_every=4), tk.adamw(lr=0.05)
STEPS, EVERY, KILLED = 12, 3, 8
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.25), nn.Linear(8, 2))


def _loss(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return (apply(batch) - 1.0).square().mean()


def _train(folder: Path, killed: bool) -> list[int]:
    """Train as a user's script does; return the steps that this attempt has made."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    made = []
    with launched():
        rank, model = 0 if is_first() else 1, _network()
        try:
            state = tk.load_sharded(folder, CONFIG, model, ADAM)
        except FileNotFoundError:
            state = tk.init_state(model, CONFIG, ADAM)
        step = tk.make_train_step(
            model, _loss, CONFIG, ADAM, compile=False, engine="dense", process_group=world()
        )
        while (number := int(state.step)) < STEPS:
            if killed and rank == 1 and number == KILLED and os.environ[RESTARTS] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            chance = torch.Generator().manual_seed(10 * number + rank)
            state, _ = step(state, torch.randn(4, 6, generator=chance))
            made.append(number)
            if int(state.step) % EVERY == 0:
                tk.save_sharded(state, folder, CONFIG)
    return made


def _run(folder: Path, killed: bool) -> list[list[int]]:
    """Let torchrun's agent start two processes; return what those made that came to the end."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        monitor_interval=0.1,
    )
    found = elastic_launch(config, _train)(folder, killed)
    return [found[rank] for rank in range(2)]


def test_a_run_that_is_killed_and_restarted_ends_where_another_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see `load_sharded`
    assert FORKING.get_start_method() == "forkserver"
    assert _run(tmp_path / "whole", killed=False) == 2 * [[*range(STEPS)]]
    last = EVERY * (KILLED // EVERY)
    assert _run(tmp_path / "killed", killed=True) == 2 * [[*range(last, STEPS)]]
    ends = (tk.load_sharded(tmp_path / name, CONFIG) for name in ("whole", "killed"))
    same(*ends)
