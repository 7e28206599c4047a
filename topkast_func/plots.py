"""Pictures of sets and losses; each function returns a matplotlib Figure."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from topkast_func.masks import Masks

COLORS = {"Θ∖B: at rest": "#e8e6df", "B∖A: explored": "#f2a65a", "A: active": "#1f4e79"}


def sets(masks: Masks, title: str = "") -> Figure:
    """Draw which entries of a weight are in A, in B∖A and in neither.

    Args:
        masks: Sets of a weight; axes after the first are laid side by side.
        title: Words above the picture.

    Returns:
        The figure.
    """
    rows = masks.forward.shape[0]
    level = (masks.forward.int() + masks.backward.int()).reshape(rows, -1).cpu().numpy()
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.imshow(
        level,
        cmap=ListedColormap(list(COLORS.values())),
        vmin=0,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set(title=title, xlabel="input", ylabel="output")
    shares = [(level == value).mean() for value in range(3)]
    axes.legend(
        handles=[
            Patch(facecolor=color, edgecolor="grey", label=f"{name} ({share:.0%})")
            for (name, color), share in zip(COLORS.items(), shares, strict=True)
        ],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


def losses(train: ArrayLike, validation: ArrayLike) -> Figure:
    """Draw training and validation loss over epochs, logarithmically where all are positive.

    Args:
        train: Mean loss of each epoch's batches.
        validation: Loss on the validation part after each epoch; may be empty.

    Returns:
        The figure.
    """
    curves = {"training": np.asarray(train), "validation": np.asarray(validation)}
    drawn = {label: curve for label, curve in curves.items() if not np.isnan(curve).all()}
    figure, axes = plt.subplots(layout="constrained")
    for label, curve in drawn.items():
        axes.plot(range(1, len(curve) + 1), curve, label=label)
    logarithmic = not any((curve <= 0).any() for curve in drawn.values())
    axes.set(xlabel="epoch", ylabel="loss", yscale="log" if logarithmic else "linear")
    if drawn:
        axes.legend()
    return figure
