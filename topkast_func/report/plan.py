"""What a training takes on many processes: bytes of each, and what it sends in a step."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from topkast_func.checks import check_count
from topkast_func.config import TopKastConfig
from topkast_func.distributed.models import averaged_buffers
from topkast_func.model.alone import alone_with, as_plain
from topkast_func.model.modules import buffers_of, frozen
from topkast_func.report.shares import Share, bytes_of, most, shares_of, total
from topkast_func.report.table import in_bytes, paragraph, table
from topkast_func.training.first_weights import outlined_weights
from topkast_func.training.optim import Optimizer, adamw, check_optimizer
from topkast_func.training.split import unsplit, whole_by
from topkast_func.training.state import Weights
from topkast_func.types import Params

COMPACT, OWNERS, DENSE = "compact", "owners", "dense storage"
REST, OWNERS_REST = (f"{name}, θ on the host" for name in (COMPACT, OWNERS))
DDP, FSDP = "dense model, DDP", "dense model, FSDP2"
HOST = {"theta_device": "cpu"}


class Layout(NamedTuple):
    """A way to train on many processes; where ranks differ, that of the rank with most.

    Attributes:
        name: How it prints.
        device: Bytes of a rank on its device: parameters, gradients, slots, sets, buffers.
        host: Bytes of a rank on its host.
        sent: Bytes that a rank sends in a step, and receives, where a ring sums or gathers.
        options: What `init_state` is to be told; None for what is not of this library.
        shard: What `make_train_step` is to be told.
    """

    name: str
    device: int
    host: int
    sent: int
    options: dict[str, Any] | None = None
    shard: Literal["owners"] | None = None


class Plan:
    """Layouts beside each other; prints as a table.

    Attributes:
        layouts: Those of this library, the fastest first; then DDP and FSDP2 of a dense model.
        world_size: How many ranks there are.
        memory: Bytes that a device has for them; None if it is not known.
        notes: What is said below the table.
    """

    def __init__(
        self, layouts: Sequence[Layout], world_size: int, memory: int | None, notes: Sequence[str]
    ) -> None:
        self.layouts, self.world_size, self.memory = list(layouts), world_size, memory
        self.notes = list(notes)

    @property
    def choice(self) -> Layout | None:
        """The first layout of this library that fits into the memory; None where none does."""
        own = (layout for layout in self.layouts if layout.options is not None)
        return next((layout for layout in own if self._fits(layout)), None)

    def __repr__(self) -> str:
        """Print the table as text."""
        head = [f"bytes of each of {self.world_size:,}", "device", "host", "sent a step"]
        rows = [[layout.name, *map(in_bytes, layout[1:4])] for layout in self.layouts]
        if self.memory is not None:
            head.append("fits")
            for row, layout in zip(rows, self.layouts, strict=True):
                row.append("yes" if self._fits(layout) else "no")
        return "\n".join([table(head, rows), *map(paragraph, self.notes)])

    def _fits(self, layout: Layout) -> bool:
        return self.memory is None or layout.device <= self.memory


def plan(
    model: nn.Module | Params,
    config: TopKastConfig,
    world_size: int,
    optimizer: Optimizer | None = None,
    *,
    memory: int | None = None,
    master: torch.dtype | None = None,
) -> Plan:
    """Estimate what training takes on many processes, before anything is made.

    Counted is what stays from step to step, and gradients; activations, and what a step or a
    refresh needs for a moment, come on top. A ring of N ranks that sums m bytes sends 2·m·(N−1)/N
    of each, one that gathers or scatters them m·(N−1)/N. What is summed are the gradients of all
    that is stored, and floating buffers. Owners (``shard="owners"``) are sent the gradients of
    what they own, have its θ and slots, and send its α; what is too large for one is split among
    all. FSDP2 shards parameters, gradients and slots, gathers the parameters twice a step, and
    scatters the gradients, all in their dtype (over gloo it sums them, which sends twice that).

    Args:
        model: A module, such as one on the meta device, or weights by name; no value is read.
        config: The configuration, with the sparsities that it begins with.
        world_size: How many ranks there are to be, at least 1.
        optimizer: The optimiser; None for AdamW, with two slots.
        memory: Bytes that a device has for this; None to leave open what fits.
        master: See `init_state`; the dense models are counted with weights of this dtype too.

    Returns:
        The layouts.

    Raises:
        TypeError: A parameter is no plain tensor, ``optimizer`` none of this library, or a number
            no integer.
        ValueError: There is nothing to train, the configuration does not fit, or a number is
            below 1.

    Example:
        >>> weight = torch.empty(8192, 8192, device="meta")
        >>> model = {f"{layer}.weight": weight.clone() for layer in range(16)}
        >>> plan(model, TopKastConfig(0.9, 0.8), world_size=8, memory=6 * 10**9)
        bytes of each of 8     device  host sent a step fits
        compact                 9.53G     0        1.5G   no
        compact, θ on the host  5.23G 4.29G        1.5G  yes
        owners                  4.27G     0       1.13G  yes
        owners, θ on the host   3.73G  537M       1.13G  yes
        dense storage           19.3G     0       7.52G   no
        dense model, DDP        17.2G     0       7.52G   no
        dense model, FSDP2      2.15G     0       11.3G  yes
        dense model, FSDP2: takes less of a device than any other from 5 ranks on
    """
    world_size = check_count("world_size", world_size, 1)
    memory = None if memory is None else check_count("memory", memory, 1)
    optimizer = adamw(1e-3) if optimizer is None else optimizer
    check_optimizer(optimizer)
    model = as_plain(model)
    work = partial(_layouts, model, config, world_size, optimizer, master)
    layouts, notes = alone_with(model, work)
    return Plan(layouts, world_size, memory, notes)


def _layouts(
    model: nn.Module | Params,
    config: TopKastConfig,
    ranks: int,
    optimizer: Optimizer,
    master: torch.dtype | None,
) -> tuple[list[Layout], list[str]]:
    rest = bytes_of(buffers_of(model)) + bytes_of(frozen(model))
    averaged = bytes_of(averaged_buffers(model))

    def trained(weights: Weights) -> tuple[int, int]:
        """Return the bytes of gradients, and those of gradients and slots."""
        values = weights.values
        gradients = bytes_of(values)
        return gradients, gradients + bytes_of(optimizer.init(values).slots)

    def summed(numbers: int) -> int:
        return _ring(2 * (numbers + averaged), ranks)

    layouts = []
    shares: dict[str, Share] = {}
    kept: tuple[str, ...] = ()
    if optimizer.elementwise:
        weights = outlined_weights(model, config, "compact", master)
        gradients, moved = trained(weights)
        theta = bytes_of(weights.theta)
        held, sent = bytes_of(weights) + moved + rest, summed(gradients)
        layouts.append(Layout(COMPACT, held, 0, sent, {}))
        layouts.append(Layout(REST, held - theta, theta, sent, HOST))
        shares, kept = shares_of(weights, optimizer), unsplit(weights, config)
        layouts += _by_owners(layouts[0], shares, kept, ranks, summed(0))
    weights = outlined_weights(model, config, "dense", master)
    gradients, moved = trained(weights)
    held, theta = bytes_of(weights) + moved + rest, bytes_of(weights.theta)
    layouts.append(Layout(DENSE, held, 0, summed(gradients), {"storage": "dense"}))
    layouts.append(Layout(DDP, theta + moved + rest, 0, summed(gradients)))
    sharded = theta + moved
    layouts.append(Layout(FSDP, -(-sharded // ranks) + rest, 0, _ring(3 * theta, ranks)))
    notes = [_from(layouts, shares, kept, sharded, rest)]
    own = [layout.name for layout in layouts if layout.shard]
    largest = max(kept, key=lambda name: shares[name].entries, default=None)
    if own and largest and shares[largest].entries * ranks > total(shares.values()).entries:
        notes.append(
            f"{OWNERS}: {largest} is more than 1/{ranks} of all entries, and with "
            f"{whole_by(config)} no sparse tensor is split: further ranks spare its owner nothing"
        )
    return layouts, notes


def _by_owners(
    whole: Layout, shares: Mapping[str, Share], kept: Sequence[str], ranks: int, beside: int
) -> list[Layout]:
    """Return layouts in which tensors have owners, beside that in which each rank has all."""
    if ranks == 1 or not shares:
        return []
    every, own = total(shares.values()), most(shares, ranks, kept)
    common, sent = whole.device - every.theta - every.slots, own.sent + beside
    return [
        Layout(OWNERS, common + own.both, 0, sent, {}, "owners"),
        Layout(OWNERS_REST, common + own.slots, own.theta, sent, HOST, "owners"),
    ]


def _from(
    layouts: Sequence[Layout],
    shares: Mapping[str, Share],
    kept: Sequence[str],
    sharded: int,
    rest: int,
) -> str:
    """Say from how many ranks on sharding needs less memory."""
    alone = [layout for layout in layouts if layout.options is not None and not layout.shard]

    def least(ranks: int) -> int:
        own = [*alone, *_by_owners(alone[0], shares, kept, ranks, 0)]
        return min(layout.device for layout in own)

    every = total(shares.values())
    first = sharded // (min(least(1), alone[0].device - every.theta - every.slots) - rest) + 1
    first = max(first, 2)  # one rank has all of it, as under DDP
    while first > 2 and -(-sharded // (first - 1)) + rest < least(first - 1):
        first -= 1
    return f"{FSDP}: takes less of a device than any other from {first:,} ranks on"


def _ring(numbers: int, ranks: int) -> int:
    return numbers * (ranks - 1) // ranks
