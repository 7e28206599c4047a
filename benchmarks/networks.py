"""The networks that are trained, and a batch for each."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Problem(NamedTuple):
    """A network at its initial weights, and the batch that every step sees."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]  # inputs, and their classes


def loss_fn(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross entropy of a batch."""
    return functional.cross_entropy(apply(batch[0]), batch[1])


class Block(nn.Module):
    """A transformer block with the norms first, four times as wide in its feed-forward part."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_in, self.feed_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map sequences of tokens [batch, sequence, width] to as many."""
        projected = self.attention_in(self.attention_norm(tokens))
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        tokens = tokens + self.attention_out(mixed.transpose(1, 2).flatten(2))
        fed: Tensor = self.feed_out(functional.gelu(self.feed_in(self.feed_norm(tokens))))
        return tokens + fed


class Mean(nn.Module):
    """The mean of the tokens of each sequence."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


class Residual(nn.Module):
    """The basic block of a residual network (He and others, 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.first_norm, self.second_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, channels, height, width] to as many."""
        hidden = functional.relu(self.first_norm(self.first(images)))
        result: Tensor = functional.relu(images + self.second_norm(self.second(hidden)))
        return result


def mlp(*widths: int) -> nn.Sequential:
    """Build linear layers from ``widths[0]`` to ``widths[-1]`` features, with ReLU between them."""
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def residual(channels: int) -> nn.Sequential:
    """Build a residual block and a classifier on the mean of its pixels."""
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    return nn.Sequential(Residual(channels), *end)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp-784": (lambda: mlp(784, 512, 512, 10), (784,), 128),
    "mlp-1024": (lambda: mlp(*[1024] * 5), (1024,), 256),
    "mlp-2048": (lambda: mlp(*[2048] * 4), (2048,), 512),
    "encoder": (lambda: nn.Sequential(Block(256, 4), Mean(), *mlp(256, 10)), (64, 256), 16),
    "gpt2": (lambda: nn.Sequential(Block(768, 12, True), Mean(), *mlp(768, 10)), (256, 768), 4),
    "residual": (lambda: residual(128), (128, 16, 16), 32),
    "mlp-64": (lambda: mlp(*[64] * 4), (64,), 512),
}
"""What builds a network, the shape of one input, and how many a step takes."""


def problem(name: str, batch: int | None = None, dtype: str = "float32") -> Problem:
    """Build one of `NETWORKS` and draw its batch, the same at every call, in a dtype of torch."""
    (build, inputs, usual), kind = NETWORKS[name], getattr(torch, dtype)
    torch.manual_seed(0)
    model, size = build().to(kind), batch or usual
    x = torch.randn(size, *inputs).to(kind)
    x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    return Problem(model, (x, torch.randint(0, 10, (size,))))
