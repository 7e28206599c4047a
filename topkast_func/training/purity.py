"""What makes a step pure: a forward pass without side effects, random numbers of its own."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from topkast_func.model.modules import bind, ties, unset_buffers
from topkast_func.training.state import TrainState, forward_params
from topkast_func.types import LossFn, Model


def check_pure(model: Model, loss_fn: LossFn, state: TrainState, batch: Any) -> None:
    """Try the forward pass on copies: a compiled step would write changes into the state.

    Args:
        model: A module, or a pure function ``apply(params, *inputs)``.
        loss_fn: ``loss_fn(apply, batch)``.
        state: The state; it is not written to.
        batch: Whatever ``loss_fn`` takes; nor is it.

    Raises:
        ValueError: It changes a parameter or its inputs, gives a buffer another shape, or sets
            one that was None. What else is wrong with it is for the step to say.
    """
    batch = tree_map_only(Tensor, torch.clone, batch)
    before, unset = forward_params(state), unset_buffers(model)
    weights = {name: tensor.clone() for name, tensor in before.items()}
    held = dict(weights)
    with random_numbers_of(state), suppress(Exception):
        loss_fn(bind(model, ties(model), weights, {}, held), batch)
    same = partial(torch.allclose, rtol=0.0, atol=0.0, equal_nan=True)
    written = {name: held.pop(name) for name in state.buffers}
    if changed := [
        name
        for name, now in held.items()
        if now is not weights[name] or now._version or not same(now, before[name])
    ]:
        raise ValueError(
            f"the forward pass changes parameters {changed}: use the result of the change, or "
            "register what changes as a buffer"
        )
    if any(leaf._version for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)):
        raise ValueError("the forward pass or loss_fn changes its inputs in place: copy them first")
    if reshaped := [n for n, b in written.items() if b.shape != before[n].shape]:
        raise ValueError(f"the forward pass gives buffers {reshaped} another shape")
    found = unset_buffers(model)
    if newly_set := [name for name in unset if name not in found]:
        for module, key in (unset[name] for name in newly_set):
            module._buffers[key] = None
        raise ValueError(
            f"the forward pass sets buffers {newly_set} that were None: register them as tensors"
        )


@contextmanager
def random_numbers_of(state: TrainState) -> Iterator[None]:
    """Draw the random numbers of a step, and leave the caller's generators as they are.

    Args:
        state: The state; its seed, its step and the calls of its optimiser decide.

    Yields:
        Nothing.
    """
    device = next(iter(state.weights.values().values())).device
    cuda = [device.index] if device.type == "cuda" else []
    entropy = (int(state.seed), int(state.step), int(state.optimizer.step))
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
