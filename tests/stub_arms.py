"""What processes of benchmarks do in the tests: little, and some of it wrong."""

import os
from typing import Any

import torch


def timed(parameters: Any) -> dict[str, Any]:
    """Have a task that is right, wrong or fails; or end the process."""
    if parameters["way"] == "dies":
        os._exit(1)
    return {
        "task": {"right": (int, id), "wrong": (int, _refuse), "fails": (None, id)}[
            parameters["way"]
        ]
    }


def _refuse(output: object) -> None:
    raise ArithmeticError(f"{output} is wrong")


def fresh(parameters: Any) -> dict[str, float]:
    """Tell which process this is, and how many threads it has."""
    return {"process": float(os.getpid()), "threads": float(torch.get_num_threads())}
