"""The benchmark of many processes, at its smallest; no time is judged."""

import pytest

from benchmarks import ranks
from benchmarks.protocol import Suite

SMALL = {"network": "mlp-64", "forward_sparsity": 0.9, "backward_sparsity": 0.8, "compile": False}
DENSE = 4 * 3 * (64 * 64 + 64)


def test_steps_refreshes_and_checkpoints_of_ranks_are_timed() -> None:
    found = ranks.SECONDS.work({**SMALL, "way": ranks.OWNERS, "ranks": 2})
    assert found.keys() == {"step", "refresh", "checkpoint", "stall of an asynchronous one"}
    assert found["step"] > 0


def test_bytes_of_ranks_are_counted() -> None:
    ways = (ranks.FSDP, ranks.OWNERS)
    dense, ours = (ranks.BYTES.work({**SMALL, "way": way, "ranks": 2}) for way in ways)
    assert dense["held"] == 2 * DENSE > ours["held"] > DENSE
    assert dense["sent in a step"] > 5 * ours["sent in a step"] > DENSE / 2


@pytest.mark.parametrize("suite", [ranks.SECONDS, ranks.BYTES])
def test_every_case_has_ddp_beside_ours(suite: Suite) -> None:
    for case, arms in suite.cases.items():
        ways = {p["way"] for p in arms.values()}
        assert ways in ({*ranks.WAYS}, {ranks.DDP, ranks.OURS})
        assert {p["ranks"] for p in arms.values()} == {int(case.split()[-2])}
