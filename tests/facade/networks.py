"""Networks with every kind of layer, and what to feed them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import topkast_func as tk

PAPER = tk.topkast("value", exchange=None)
CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=3, method=PAPER)


class Attention(nn.Module):
    """A transformer layer between an embedding and a head that is tied to it, read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.block(self.embedding(tokens))
        return hidden @ self.embedding.weight.T


class Own(nn.Module):
    """A module with parameters of its own, in a list and a dictionary too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.several = nn.ParameterList([torch.randn(4, 4)])
        self.named = nn.ParameterDict({"weight": torch.randn(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight @ self.several[0].tanh() @ self.named["weight"]


class Recurrent(nn.Module):
    """A recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.rnn(x)[0]
        return output


class Case(NamedTuple):
    """A network, its input, and which of its parameters are sparse."""

    make: Callable[[], Any]
    inputs: Callable[[], Tensor]
    config: tk.TopKastConfig = CONFIG


def perceptron() -> Any:
    """Return linear layers, which kernels compute."""
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))


def transposed() -> Any:
    """Return a layer of GPT-2, whose weight is [in, out], and a linear layer."""
    first: nn.Module = Conv1D(12, 16)  # type: ignore[no-untyped-call]
    return nn.Sequential(first, nn.ReLU(), nn.Linear(12, 5))


def convolutional() -> Any:
    """Return convolutions and a linear layer, with a normalisation between them."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )


CASES = {
    "perceptron": Case(perceptron, lambda: torch.randn(6, 16)),
    "transposed": Case(transposed, lambda: torch.randn(6, 16)),
    "convolutional": Case(convolutional, lambda: torch.randn(6, 3, 5, 5)),
    "attention": Case(Attention, lambda: torch.randint(11, (3, 4))),
    "own": Case(
        Own,
        lambda: torch.randn(5, 6),
        replace(CONFIG, sparse=("*weight", "several.0")),
    ),
    "recurrent": Case(
        Recurrent,
        lambda: torch.randn(2, 3, 4),
        replace(CONFIG, sparse="rnn.weight_*"),
    ),
}

each_case = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
