"""Averages over ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from tests.distributed.processes import results
from topkast_func.distributed.bucket import mean_over

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex128, torch.float32]
SHARES = (0.25, 0.75)


def tensors(rank: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(rank)
    shapes = [(3, 4), (), (5,), (2, 2), (0,)]
    found = [torch.randn(s, generator=chance, dtype=torch.float64) for s in shapes]
    return [tensor.to(dtype) for tensor, dtype in zip(found, DTYPES, strict=True)]


def _averaged(rank: int) -> tuple[int, list[Tensor], list[Tensor]]:
    calls, own = list[int](), dist.all_reduce

    def counted(bucket: Tensor, group: dist.ProcessGroup) -> None:
        calls.append(bucket.numel())
        own(bucket, group=group)

    vars(dist)["all_reduce"] = counted
    group = dist.group.WORLD
    assert group is not None
    found = mean_over(group, torch.tensor(SHARES[rank]).double(), tensors(rank))
    empty = [torch.full((2,), math.nan), torch.ones(2)][rank]
    (of_one,) = mean_over(group, torch.tensor([0.0, 1.0][rank]), [empty])
    return len(calls), found, [of_one]


def test_means_are_weighted_and_sent_in_one_bucket_for_each_dtype() -> None:
    (calls, first, without), (_, second, _) = results(_averaged)
    assert calls == 1 + len({torch.float32, torch.float64, torch.bfloat16})
    for own, other, *parts in zip(first, second, *(tensors(rank) for rank in (0, 1)), strict=True):
        assert torch.equal(own, other)
        assert_close(own, 0.25 * parts[0] + 0.75 * parts[1])
    assert torch.equal(without[0], torch.ones(2))
