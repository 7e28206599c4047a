"""Sets that continue others: what is drawn beside them is as likely as anything else."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from topkast_func.filling import drawn_among, drawn_beside
from topkast_func.tiebreak import tie_key

DRAWS = 3000


def _frequencies(draws: list[Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(draw.flatten().nonzero().flatten().tolist()) for draw in draws)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6])
def test_every_set_of_candidates_is_as_likely(count: int) -> None:
    candidates = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]]).bool()
    draw = torch.Generator().manual_seed(count)
    found = _frequencies([drawn_among(candidates, 6, count, draw) for _ in range(DRAWS)])
    sets = torch.combinations(candidates.flatten().nonzero().flatten(), count)
    expected = DRAWS / max(1, len(sets))
    assert {*found} == ({tuple(chosen) for chosen in sets.tolist()} if count else {()})
    assert all(abs(times - expected) < 5 * expected**0.5 for times in found.values())


def test_every_set_of_a_group_is_as_likely() -> None:
    taken = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]]).bool()
    draw = torch.Generator().manual_seed(0)
    found = [drawn_beside(taken, 2, 4, draw, 4) for _ in range(DRAWS)]
    for row, own in enumerate(taken):
        times = _frequencies([marked[row] for marked in found])
        assert {*times} == {
            tuple(sorted((int(own.nonzero()), other))) for other in range(4) if not own[other]
        }
        assert all(abs(n - DRAWS / 3) < 5 * (DRAWS / 3) ** 0.5 for n in times.values())


@pytest.mark.parametrize(("rows", "group"), [(1, 2**16), (2, 2**16), (1, 2**16 + 8), (3, 2**11)])
def test_large_groups_are_drawn_evenly_too(rows: int, group: int) -> None:
    """The hash that decides among equal lots ranks what is drawn neither first nor last."""
    taken = torch.zeros(rows, group, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    found = [drawn_beside(taken, 0, 2 * rows, draw, group) for _ in range(60)]
    assert all((marked.sum(1) == 2).all() for marked in found)
    keys = tie_key(torch.arange(taken.numel())).view(rows, group)
    ranks = keys.argsort(1).argsort(1) / group
    shares = torch.cat([ranks[marked] for marked in found])
    assert abs(float(shares.mean()) - 0.5) < 5 * (12 * len(shares)) ** -0.5


def test_nearly_all_of_many_are_drawn_exactly() -> None:
    candidates = torch.rand(300, 100) < 0.9
    among = int(candidates.sum())
    drawn = drawn_among(candidates, among, among - 2, torch.Generator().manual_seed(0))
    assert int(drawn.sum()) == among - 2
    assert not (drawn & ~candidates).any()
