"""The networks that are trained, and a batch for each."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SEED = 0


class Problem(NamedTuple):
    """A network at its initial weights, and the batch that every step sees.

    Attributes:
        model: The network.
        inputs: [batch, ...], float32.
        targets: [batch], int64.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor


class Network(NamedTuple):
    """A network before it is built.

    Attributes:
        build: Builds the module.
        inputs: Shape of one input.
        batch: Inputs per step.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    batch: int


class EncoderBlock(nn.Module):
    """A transformer encoder block with the norms first, and a classifier on the mean token.

    Args:
        width: Features of a token.
        heads: Attention heads.
        hidden: Features inside the feed-forward part.
        classes: Outputs of the classifier.
    """

    def __init__(self, width: int, heads: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, hidden)
        self.feed_out = nn.Linear(hidden, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify sequences of tokens [batch, sequence, width] to [batch, classes]."""
        tokens = tokens + self._attended(self.attention_norm(tokens))
        hidden = functional.gelu(self.feed_in(self.feed_norm(tokens)))
        tokens = tokens + self.feed_out(hidden)
        logits: Tensor = self.classifier(tokens.mean(1))
        return logits

    def _attended(self, tokens: Tensor) -> Tensor:
        projected = self.attention_in(tokens).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.movedim(2, 0).transpose(2, 3)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return attended


def mlp(*widths: int) -> nn.Sequential:
    """Build linear layers with ReLU between them.

    Args:
        widths: Features from the input to the output.

    Returns:
        The network.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


NETWORKS = {
    "mlp-784": Network(lambda: mlp(784, 512, 512, 10), (784,), 128),
    "mlp-1024": Network(lambda: mlp(*[1024] * 5), (1024,), 256),
    "mlp-2048": Network(lambda: mlp(*[2048] * 4), (2048,), 512),
    "encoder": Network(lambda: EncoderBlock(256, 4, 1024, 10), (64, 256), 16),
    "mlp-64": Network(lambda: mlp(*[64] * 4), (64,), 512),
}


def problem(name: str, batch: int | None = None) -> Problem:
    """Build a network and draw its batch, from one seed.

    Args:
        name: Key of `NETWORKS`.
        batch: Inputs per step; None takes the network's own.

    Returns:
        The problem, the same at every call.
    """
    network = NETWORKS[name]
    torch.manual_seed(SEED)
    model = network.build()
    size = batch or network.batch
    return Problem(model, torch.randn(size, *network.inputs), torch.randint(0, 10, (size,)))


def replaced(model: nn.Module, layer_of: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """Put another layer in the place of every linear layer of a model.

    Args:
        model: The model; it is changed.
        layer_of: ``layer_of(name, linear)``, the other layer.

    Returns:
        The model.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer_of(name, linear))
    return model
