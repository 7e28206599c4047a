"""The networks that are made sparse, and smaller ones of the same kind."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

MLP_WIDTH, CHANNELS = 512, 16
DECODER_WIDTH, DECODER_LAYERS, HEADS = 256, 4, 4
ALPHABET, LONGEST = 80, 64
"""Characters of a text and of a window, at most."""


def mlp(parameters: float | None) -> nn.Module:
    """Build 784-w-w-10.

    Args:
        parameters: About how many it is to have; None for w = 512.

    Returns:
        The network.
    """
    w = MLP_WIDTH if parameters is None else _width(parameters, 784 + 12, 1)
    return nn.Sequential(nn.Linear(784, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))


def cnn(parameters: float | None) -> nn.Module:
    """Build two convolutions of stride 2, w and 2w channels, and linear layers 98w-4w-10.

    Args:
        parameters: About how many it is to have; None for w = 16.

    Returns:
        The network.
    """
    w = CHANNELS if parameters is None else _width(parameters, 9 + 3 + 4 + 40, 18 + 392)
    return nn.Sequential(
        nn.Conv2d(1, w, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(98 * w, 4 * w),
        nn.ReLU(),
        nn.Linear(4 * w, 10),
    )


def decoder(parameters: float | None) -> nn.Module:
    """Build a decoder-only transformer of width w, four layers deep.

    Args:
        parameters: About how many it is to have; None for w = 256, 3.2 million.

    Returns:
        The network.
    """
    if parameters is None:
        return Decoder(DECODER_WIDTH)
    wanted = _width(parameters, 2 * ALPHABET + LONGEST, 12 * DECODER_LAYERS)
    return Decoder(max(HEADS, HEADS * round(wanted / HEADS)))


class Decoder(nn.Module):
    """Predicts the next character of each place.

    Weights start normal with variance 1 / fan-in (LeCun and others, 1998), characters and places
    with a standard deviation of 0.02 (GPT-2).

    Args:
        width: Features of a character.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(ALPHABET, width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(DECODER_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ALPHABET)
        nn.init.normal_(self.characters.weight, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits [batch, length, alphabet] of codes [batch, length]."""
        hidden = self.characters(codes) + self.places[: codes.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_in, self.feed_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        projected = self.attention_in(self.attention_norm(hidden)).unflatten(-1, (3, HEADS, -1))
        query, key, value = projected.movedim(2, 0).transpose(2, 3)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))
        fed: Tensor = self.feed_out(functional.gelu(self.feed_in(self.feed_norm(hidden))))
        return hidden + fed


def _width(parameters: float, linear: int, square: int) -> int:
    """Return the w for which square·w² + linear·w is nearest to a number of parameters."""
    root = math.sqrt(linear**2 + 4 * square * parameters)
    return max(1, round((root - linear) / (2 * square)))
