"""The benchmark of many processes, at its smallest; no time is judged."""

import pytest

from benchmarks import ranks
from benchmarks.protocol import Suite

SMALL = {"network": "mlp-784", "forward_sparsity": 0.9, "backward_sparsity": 0.8, "compile": False}


def test_steps_of_ranks_are_timed_and_what_they_send_is_counted() -> None:
    told = {way: {**SMALL, "way": way, "ranks": 2} for way in ranks.WAYS}
    assert ranks.SECONDS.work({**told["DDP"], "ranks": 1})["step"] > 0
    sent = {way: ranks.TRAFFIC.work(p)["step"] for way, p in told.items()}
    dense = 2 * 4 * (784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10)
    assert sent["DDP"] > dense
    assert 0.2 * dense < sent["topkast"] < 0.5 * sent["DDP"]


@pytest.mark.parametrize("suite", [ranks.SECONDS, ranks.TRAFFIC])
def test_every_case_has_ddp_beside_ours(suite: Suite) -> None:
    for case, arms in suite.cases.items():
        assert {p["way"] for p in arms.values()} == {ranks.DDP, ranks.OURS}
        assert {p["ranks"] for p in arms.values()} == {int(case.split()[-2])}
