"""Whether the numbers in sets are those of sets: places in a weight, each once, A within B."""

import torch

from topkast_func.kernels.pattern import BlockRows, Pattern
from topkast_func.places import counted
from topkast_func.reading import readable
from topkast_func.storage.index import MADE, Index, Positions, index_of, masks_at, note, tensors_of
from topkast_func.types import Masks


def is_sound(sets: Index | Masks, block: tuple[int, int], shape: torch.Size) -> bool:
    """Return whether the numbers in sets are those of sets, looked at once; see `Sound.knows`.

    Args:
        sets: The sets, of dtypes and shapes that go together; of their numbers nothing is known.
        block: (r, c) of the blocks of a pattern.
        shape: Of θ.

    Returns:
        Whether A is within B and, of an index, whether it is the one of its sets.
    """
    held = tensors_of(sets)
    if not all(map(readable, held)):
        return True
    if MADE.knows(held, (block, shape)):
        return True
    if isinstance(sets, Masks):
        sound = not bool((sets.forward > sets.backward).any())
    else:
        sound = _points_within(sets, block, shape) and _is_as_made(sets, block, shape)
    if sound:
        note(sets, block, shape)
    return sound


def _points_within(index: Index, block: tuple[int, int], shape: torch.Size) -> bool:
    """Return whether an index points to nothing outside θ."""
    if isinstance(index, Positions):
        return not any(bool(((part < 0) | (part > shape.numel())).any()) for part in index)
    rows, columns = shape[0] // block[0], shape[1:].numel() // block[1]
    return all(_fits(part, rows, columns) for part in (index.forward, index.exploring))


def _fits(part: BlockRows, rows: int, columns: int) -> bool:
    pointers, found = part
    first, last = int(pointers[0]), int(pointers[-1])
    wrong = (pointers.diff() < 0).any() | ((found < 0) | (found >= columns)).any()
    return first == 0 and last <= len(found) and not bool(wrong)


def _is_as_made(index: Index, block: tuple[int, int], shape: torch.Size) -> bool:
    masks = masks_at(index, block, shape)
    active, whole = counted(masks)
    by_kernel, places = isinstance(index, Pattern), index.exploring_count
    made = index_of(masks, block, (active, whole), by_kernel, places)
    return all(map(torch.equal, tensors_of(index), tensors_of(made)))
