"""What is computed otherwise for a while, in one thread."""

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from topkast_func.ranking import ranked_by, top_sets
from topkast_func.training.optim import global_norm, summed_by


def first(name: str, scores: Tensor, places: Any, forward: int, backward: int) -> Any:
    marks = torch.arange(scores.numel())
    return marks < forward, marks < backward


def last(name: str, scores: Tensor, places: Any, forward: int, backward: int) -> Any:
    return tuple(mask.flip(0) for mask in first(name, scores, places, forward, backward))


CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "ranking": (
        ranked_by,
        (first, last),
        lambda: top_sets("w", torch.tensor([1.0, 3.0, 2.0]), 1, 1)[0].tolist(),
        ([False, True, False], [True, False, False], [False, False, True]),
    ),
    "norm": (
        summed_by,
        (lambda n: 4 * n, lambda n: 9 * n),
        lambda: global_norm({"w": torch.ones(1)}).item(),
        (1.0, 2.0, 3.0),
    ),
}


@pytest.mark.parametrize(("taken", "ways", "run", "found"), CASES.values(), ids=CASES)
def test_the_outer_way_goes_on_after_an_inner_one_that_fails(
    taken: Any, ways: Any, run: Any, found: Any
) -> None:
    own, outer, inner = found
    with taken(ways[0]):
        assert run() == outer
        with contextlib.suppress(KeyError), taken(ways[1]):
            assert run() == inner
            raise KeyError
        assert run() == outer
        others: list[Any] = []
        thread = threading.Thread(target=lambda: others.append(run()))
        thread.start()
        thread.join()
        assert others == [own]
    assert run() == own
