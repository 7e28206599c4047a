"""Every kind of optimiser, alone and put together."""

import torch
from torch import Tensor

import topkast_func as tk


def halving(step: Tensor) -> Tensor:
    """Halve the learning rate at each step."""
    return 0.125 * torch.pow(torch.tensor(0.5), step)


ALONE = {
    "sgd": tk.sgd(lr=0.1),
    "momentum": tk.sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": tk.adam(lr=0.01),
    "adamw": tk.adamw(lr=0.01),
    "lion": tk.lion(lr=0.002, weight_decay=0.01),
    "schedule": tk.sgd(lr=halving, momentum=0.9),
}
TOGETHER = {
    "clipped": tk.chain(tk.clip_by_global_norm(0.5), tk.adamw(lr=0.01)),
    "gathered": tk.multi_steps(tk.adamw(lr=0.01), 2),
    "grouped": tk.partition({"*bias": tk.sgd(lr=0.1), "*": tk.lion(lr=0.002)}),
    "all": tk.multi_steps(
        tk.chain(
            tk.clip_by_global_norm(0.5),
            tk.partition({
                "*bias": tk.adamw(lr=0.01, weight_decay=0.0),
                "0.*": tk.sgd(lr=halving, momentum=0.9),
                "*": tk.adamw(lr=0.01),
            }),
        ),
        2,
    ),
}
EVERY = ALONE | TOGETHER
