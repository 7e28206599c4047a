"""What training large models would take by `tk.plan`, as tables; nothing is measured."""

import torch
from torch import nn

import topkast_func as tk
from benchmarks.steps import ENTRIES, USUAL, Block
from benchmarks.views import markdown
from topkast_func.report.table import in_bytes

MODELS = {1: (4096, 8), 7: (16384, 8), 100: (32768, 64)}  # by 10⁹ parameters: width, and ranks
BLOCK: Block = (16, 16)


def tables() -> str:
    """Return a table for each model, this library beside DDP and FSDP2."""
    return "\n\n".join(_table(billions, *told) for billions, told in MODELS.items())


def linear(billions: float, width: int) -> nn.Sequential:
    """Return square layers on the meta device, of about so many parameters together."""
    count = round(billions * 1e9 / width**2)
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def _table(billions: int, width: int, ranks: int) -> str:
    model = linear(billions, width)
    entries, blocks = (
        tk.plan(model, tk.TopKastConfig(*USUAL, block_shape=block), ranks)
        for block in (ENTRIES, BLOCK)
    )
    names = {layout[:4]: layout.name for layout in entries.layouts}
    for layout in blocks.layouts:  # which may be as large
        names.setdefault(layout[:4], f"{layout.name}, {BLOCK[0]}×{BLOCK[1]} blocks")
    title = f"{billions}·10⁹ parameters in layers of {width}×{width}, each of {ranks} ranks"
    rows = [(name, *map(in_bytes, layout[1:4])) for layout, name in names.items()]
    notes = f"Single entries: {entries.notes[0]}. Blocks: {blocks.notes[0]}."
    return f"{markdown((title, 'device', 'host', 'sent in a step'), rows)}\n\n{notes}"
