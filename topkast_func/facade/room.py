"""Too little memory for new sets: the weights stay as they were, and the error says the way on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from topkast_func.facade.owners import Owners
from topkast_func.training.refresh import NO_ROOM

AGAIN = (
    f"{NO_ROOM}; the model is as it was. Make room, by optimizer.zero_grad(set_to_none=True) say, "
    "and call it again, or train with make_train_step, where θ can rest on the host: "
    "init_state(..., theta_device='cpu')"
)


@contextmanager
def whole(owners: Owners) -> Iterator[None]:
    """Give the weights their sets and rules back where the device has no room for new sets.

    Args:
        owners: The sparse weights.

    Yields:
        Nothing.

    Raises:
        torch.OutOfMemoryError: The device has too little memory; the text says the way on.
    """
    pairs = [pair for several in owners.values() for pair in several]
    held = [(weight, weight.rule, weight.given, weight.sets(layer)) for layer, weight in pairs]
    bits: list[Tensor] = []
    try:
        bits += [sets.clone() for *_, sets in held]
        yield
    except torch.OutOfMemoryError as reason:
        for (weight, rule, given, sets), before in zip(held, bits, strict=False):
            weight.rule, weight.given = rule, given
            sets.copy_(before)
        raise torch.OutOfMemoryError(AGAIN) from reason
