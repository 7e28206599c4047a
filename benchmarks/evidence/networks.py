"""The networks that are made sparse, and smaller ones of the same kind."""

import math

import torch
from torch import Tensor, nn

from benchmarks.networks import Block
from benchmarks.networks import mlp as linear_layers

MLP_WIDTH, CHANNELS = 512, 16
HEADS = 4
ALPHABET, LONGEST = 80, 64
"""Characters of a text and of a sequence, at most."""


def mlp(parameters: float | None) -> nn.Module:
    """Build 784-w-w-10 of about so many parameters; None for w = 512."""
    w = MLP_WIDTH if parameters is None else _width(parameters, 784 + 12, 1)
    return linear_layers(784, w, w, 10)


def cnn(parameters: float | None) -> nn.Module:
    """Build convolutions of stride 2, w and 2w channels, then 98w-4w-10; None for w = 16."""
    w = CHANNELS if parameters is None else _width(parameters, 9 + 3 + 4 + 40, 18 + 392)
    return nn.Sequential(
        nn.Conv2d(1, w, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        *linear_layers(98 * w, 4 * w, 10),
    )


def decoder(width: int, layers: int, parameters: float | None) -> nn.Module:
    """Build a `Decoder` of so many layers and about so many parameters; None for that width."""
    linear, square = 2 * ALPHABET + LONGEST, 12 * layers
    wanted = width if parameters is None else _width(parameters, linear, square)
    return Decoder(max(HEADS, HEADS * round(wanted / HEADS)), layers)


class Decoder(nn.Module):
    """Predicts the next character of each place, by causal transformer blocks.

    Weights start normal with variance 1 / fan-in (LeCun and others, 1998), characters and places
    with a standard deviation of 0.02 (GPT-2).
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(ALPHABET, width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        blocks = (Block(width, HEADS, causal=True) for _ in range(layers))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, ALPHABET)
        nn.init.normal_(self.characters.weight, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits [batch, length, alphabet] of codes [batch, length]."""
        hidden = self.characters(codes) + self.places[: codes.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def _width(parameters: float, linear: int, square: int) -> int:
    """Return the w for which square·w² + linear·w is nearest to a number of parameters."""
    root = math.sqrt(linear**2 + 4 * square * parameters)
    return max(1, round((root - linear) / (2 * square)))
