"""What the processes of these tests begin with: modules and machine code, made once."""

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

import topkast_func  # noqa: F401
from topkast_func.kernels.numba_cpu import prepare

for dtype in (torch.float32, torch.float64):
    prepare((1, 1), dtype).join()
