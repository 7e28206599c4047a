"""Damaged state files at random: `python -m tests.damage 2000` counts what `load` makes of them.

Half of the damage is blind, as that of a disk or a wire. The rest has its checksums made to fit
again, as an ill-meaning or another program would, and breaks a rule of the content.
"""

import json
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

import topkast_func as tk
from topkast_func.files import container

JUNK: list[Any] = [{"junk": None}, [[[]]], -(10**30), -1.5, "\x00", [10**9], [True], {}, 10**400]
ROOM = 2**30
"""Bytes of address space that a load may take beyond what the process has."""


class Saved(NamedTuple):
    """A state file, and what it is of."""

    content: bytes
    model: nn.Module
    optimizer: tk.Optimizer


class Damaged(NamedTuple):
    """Content that must be refused: by all, or by those who give the model and optimiser."""

    content: bytes
    needs_model: bool = False


def saved(folder: Path) -> Iterator[Saved]:
    """Save states of a few steps in both storages, with buffers, frozen and dense parameters."""
    for storage, optimizer in (("compact", tk.adam()), ("dense", tk.sgd(0.1, momentum=0.9))):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 24), nn.Linear(24, 9)
        )
        model[4].bias.requires_grad_(False)
        model.register_buffer("wave", torch.randn(3, dtype=torch.complex128))
        config = tk.TopKastConfig(0.95, 0.9, refresh_every=2)
        state = tk.init_state(model, config, optimizer, storage=storage, seed=5)  # type: ignore[arg-type]
        step = tk.make_train_step(model, _loss, config, optimizer, compile=False)
        for batch in torch.randn(3, 8, 1, 6, 6):
            state, _ = step(state, batch)
        tk.save(state, folder / storage, config)
        yield Saved((folder / storage).read_bytes(), model, optimizer)


def _loss(apply: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return (apply(batch) - 1).square().mean()


# --- blind -------------------------------------------------------------------------------


def flipped(content: bytes, random: Random) -> Damaged:
    """Flip a few bits."""
    changed = bytearray(content)
    for bit in random.sample(range(8 * len(content)), random.choice([1, 1, 1, 2, 9])):
        changed[bit // 8] ^= 1 << bit % 8
    return Damaged(bytes(changed))


def flipped_in_header(content: bytes, random: Random) -> Damaged:
    """Flip one bit of what comes before the tensors."""
    changed = bytearray(content)
    bit = random.randrange(8 * (len(content) - len(_parts(content)[1])))
    changed[bit // 8] ^= 1 << bit % 8
    return Damaged(bytes(changed))


def cut(content: bytes, random: Random) -> Damaged:
    """Leave out the end."""
    return Damaged(content[: random.randrange(len(content))])


def grown(content: bytes, random: Random) -> Damaged:
    """Put something at the end."""
    return Damaged(content + random.randbytes(random.randrange(1, 100)))


def overwritten(content: bytes, random: Random) -> Damaged:
    """Write zeros, ones or noise over a part."""
    start = random.randrange(len(content))
    size = min(random.randrange(1, 600), len(content) - start)
    filling = random.choice([bytes(size), b"\xff" * size, random.randbytes(size)])
    changed = content[:start] + filling + content[start + size :]
    return Damaged(changed) if changed != content else flipped(content, random)


def swapped(content: bytes, random: Random) -> Damaged:
    """Let two tensors stand at each other's place."""
    entries, data = _parts(content)
    one, other = random.sample(sorted(_tensors(content).keys()), 2)
    entries[one], entries[other] = entries[other], entries[one]
    return Damaged(_joined(entries, data))


def edited(content: bytes, random: Random) -> Damaged:
    """Put something of any type in a place of either header, which then has a wrong checksum."""
    entries, data = _parts(content)
    header = json.loads(entries["__metadata__"]["topkast_func"])
    inner = random.random() < 0.5
    _replace_in(header if inner else entries, random, random.choice(JUNK))
    if inner:
        entries["__metadata__"]["topkast_func"] = json.dumps(header)
    return Damaged(_joined(entries, data))


# --- with checksums that fit --------------------------------------------------------------


def forged_entry(content: bytes, random: Random) -> Damaged:
    """Say something impossible of a tensor."""
    entries, data = _parts(content)
    name = random.choice(sorted(entries.keys() - {"__metadata__"}))
    key = random.choice(["dtype", "shape", "data_offsets"])
    number = 10 ** random.randrange(6, 40)
    size = len(data)
    values: dict[str, list[Any]] = {
        "dtype": ["I7", "U128"],
        "shape": [[number], [-1, -number]],
        "data_offsets": [[0, number], [size, size + 1], [-1, 3], [3, 1]],
    }
    entries[name][key] = random.choice([*JUNK, *values[key]])
    return Damaged(_sealed(entries, data))


def forged_header(content: bytes, random: Random) -> Damaged:
    """Put what is of no right type in a place of the state's header."""
    entries, data = _parts(content)
    header = json.loads(entries["__metadata__"]["topkast_func"])
    place = random.choice([key for key in header if key != "config"] + [*header["config"]])
    where = header if place in header else header["config"]
    where[place] = random.choice([
        {"junk": None},
        [[[]]],
        -(10**30),
        {"name": 3},
        -(10**400),
        "x" * 5000,
    ])
    entries["__metadata__"]["topkast_func"] = json.dumps(header)
    return Damaged(_sealed(entries, data))


def forged_configuration(content: bytes, random: Random) -> Damaged:
    """Leave out a field of the configuration, which then would have its default."""
    entries, data = _parts(content)
    header = json.loads(entries["__metadata__"]["topkast_func"])
    del header["config"][random.choice(sorted(header["config"]))]
    entries["__metadata__"]["topkast_func"] = json.dumps(header)
    return Damaged(_sealed(entries, data))


def forged_values(content: bytes, random: Random) -> Damaged:
    """Ask for huge or for too few values of B."""
    header, tensors = _opened(content)
    number = random.choice([0, 1, 10**9, 10**18, 10**30])
    shape = random.choice([[number], [number, 1, 1], [], [number] * 3, [1.5], [True], [-number]])
    name = random.choice(["0.weight", "3.weight", "9.weight"])
    header["values"] = {**header.get("values", {}), name: shape}
    return Damaged(_written(header, tensors))


def forged_name(content: bytes, random: Random) -> Damaged:
    """Rename a tensor."""
    header, tensors = _opened(content)
    name = random.choice(sorted(tensors))
    kept = {other: tensor for other, tensor in tensors.items() if other != name}
    renamed = random.choice([f"x{name}", name.replace("/", ""), f"slots/{name}", name.upper()])
    return Damaged(_written(header, {**kept, renamed if renamed != name else "y": tensors[name]}))


def forged_absence(content: bytes, random: Random) -> Damaged:
    """Leave out a tensor."""
    header, tensors = _opened(content)
    name = random.choice(sorted(tensors))
    del tensors[name]
    return Damaged(_written(header, tensors), needs_model=True)


def forged_counter(content: bytes, random: Random) -> Damaged:
    """Count in another way than from 0 up."""
    header, tensors = _opened(content)
    wrong = [torch.tensor(-random.randrange(1, 2**63)), torch.tensor([1]), torch.tensor(1.0)]
    tensors[random.choice(["step", "seed", "mask_seed", "optimizer_step"])] = random.choice(wrong)
    return Damaged(_written(header, tensors))


def forged_number(content: bytes, random: Random) -> Damaged:
    """Let θ have NaN, or a dtype that is no weight's."""
    header, tensors = _opened(content)
    theta = tensors[random.choice([name for name in tensors if name.startswith("theta/")])]
    name = next(name for name in tensors if tensors[name] is theta)
    tensors[name] = random.choice([theta / 0 * 0, theta.int(), theta[:0], theta.bool()])
    return Damaged(_written(header, tensors))


def forged_set(content: bytes, random: Random) -> Damaged:
    """Let A or B have another entry, or be no packed set."""
    header, tensors = _opened(content)
    name = random.choice([n for n in tensors if n.startswith(("forward/", "backward/"))])
    packed = tensors[name]
    if packed.dtype == torch.uint8 and random.random() < 0.5:
        packed.view(-1)[random.randrange(len(packed))] ^= 1 << random.randrange(8)
    else:
        wrong = [packed[:-1], packed.repeat(2), packed.float(), packed.int() - 2**31, packed.long()]
        tensors[name] = random.choice(wrong)
    return Damaged(_written(header, tensors))


def forged_slot(content: bytes, random: Random) -> Damaged:
    """Give a slot another dtype or shape."""
    header, tensors = _opened(content)
    name = random.choice([name for name in tensors if name.startswith("slots/")])
    slot = tensors[name]
    wrong = [slot.double(), slot.int(), slot[:-1], slot[None], slot.flatten().repeat(2)]
    tensors[name] = random.choice(wrong)
    return Damaged(_written(header, tensors), needs_model=True)


KINDS: list[Callable[[bytes, Random], Damaged]] = [
    flipped,
    flipped_in_header,
    cut,
    grown,
    overwritten,
    swapped,
    edited,
    forged_entry,
    forged_header,
    forged_configuration,
    forged_values,
    forged_name,
    forged_absence,
    forged_counter,
    forged_number,
    forged_set,
    forged_slot,
]


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def _sealed(entries: dict[str, Any], data: bytes) -> bytes:
    head = _joined(entries, b"")
    return head + data[:-16] + blake2b(head, digest_size=16).digest()


def _tensors(content: bytes) -> dict[str, Tensor]:
    return safetensors.torch.load(content)


def _opened(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = _tensors(content)
    del tensors["checksums"]
    return json.loads(_parts(content)[0]["__metadata__"]["topkast_func"]), tensors


def _written(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    file = BytesIO()
    container.write(file, header, tensors)
    return file.getvalue()


def _replace_in(tree: dict[str, Any], random: Random, value: Any) -> None:
    """Put a value in a random place of a tree of JSON."""
    key = random.choice(sorted(tree))
    if isinstance(tree[key], dict) and tree[key] and random.random() < 0.7:
        _replace_in(tree[key], random, value)
    else:
        tree[key] = value


# --- what load makes of them ---------------------------------------------------------------


def outcomes(count: int, seed: int, folder: Path) -> Counter[tuple[str, str]]:
    """Load damaged files.

    Args:
        count: How many.
        seed: Of the damage.
        folder: Where they are written, one after another.

    Returns:
        How often each kind of damage met each outcome: "refused" where every `load` raised
        ValueError in words of at most 2,000 characters.
    """
    found: Counter[tuple[str, str]] = Counter()
    random, files = Random(seed), list(saved(folder))
    path = folder / "damaged"
    for number in range(count):
        content, model, optimizer = files[number % len(files)]
        damage = KINDS[number // len(files) % len(KINDS)]
        damaged = damage(content, random)
        assert damaged.content != content
        path.write_bytes(damaged.content)
        loads: list[tuple[Any, ...]] = [(path, None, model, optimizer)]
        if not damaged.needs_model:
            loads.append((path,))
        for arguments in loads:
            outcome = _outcome(arguments)
            found[damage.__name__, outcome] += 1
            if outcome != "refused":
                (folder / f"{outcome}-{number}").write_bytes(damaged.content)
    return found


def _outcome(arguments: tuple[Any, ...]) -> str:
    try:
        tk.load(*arguments)
    except ValueError as reason:
        return "refused" if len(str(reason)) < 2000 else "refused in too many words"
    except Exception as reason:
        traceback.print_exc()
        return f"raised {type(reason).__name__}"
    return "accepted"


def limited(room: int) -> None:
    """Let this process take no more than ``room`` bytes of address space more, on Linux."""
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(count: int, seed: int = 0) -> None:
    """Print how often each kind of damage met each outcome, as JSON."""
    with TemporaryDirectory() as folder:
        limited(ROOM)
        found = outcomes(count, seed, Path(folder))
        print(json.dumps({f"{kind}: {outcome}": n for (kind, outcome), n in found.items()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
