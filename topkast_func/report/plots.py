"""Pictures of sets, their changes, losses and results; each returns a matplotlib Figure."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from topkast_func.checks import check_count
from topkast_func.report.history import Refresh
from topkast_func.trees import check_mask_pair
from topkast_func.types import Masks

LEGEND_ROWS, LEGEND_WIDTH = 24, 2.0
"""Names in one column of a legend beside the axes, and its width in inches."""

COLORS = {"Θ∖B: at rest": "#e8e6df", "B∖A: explored": "#f2a65a", "A: active": "#1f4e79"}


def sets(masks: Masks, title: str = "") -> Figure:
    """Draw which entries of a weight are in A, in B∖A and in neither.

    Args:
        masks: Sets of a weight; axes after the first are laid side by side.
        title: Words above the picture.

    Returns:
        The figure.

    Raises:
        TypeError: They are not `Masks` of bool.
        ValueError: They are of different shapes, or of no entry or axis.
    """
    check_mask_pair("masks", masks)
    if not masks.forward.ndim or not masks.forward.numel():
        raise ValueError(f"masks of shape {tuple(masks.forward.shape)} have nothing to draw")
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


def losses(
    train: ArrayLike,
    validation: ArrayLike = (),
    xlabel: str = "epoch",
    *,
    others: Mapping[str, ArrayLike] | None = None,
    best: int | None = None,
    title: str = "",
) -> Figure:
    """Draw training and validation loss, logarithmically where all are positive.

    Args:
        train: Losses in order, such as the mean of each epoch's batches or those of a `History`.
        validation: Loss on the validation part after each epoch; may be empty.
        xlabel: What is counted, "epoch" or "step".
        others: Losses to compare with, such as those of a dense twin, by their label.
        best: Number of the best epoch, from 0, to be marked; None for none.
        title: Words above the picture.

    Returns:
        The figure.
    """
    curves = {"training": train, "validation": validation, **(others or {})}
    arrays = {label: np.asarray(curve) for label, curve in curves.items()}
    drawn = {label: curve for label, curve in arrays.items() if not np.isnan(curve).all()}
    figure, axes = plt.subplots(layout="constrained")
    for label, curve in drawn.items():
        style = "--" if others and label in others else "-"
        axes.plot(range(1, len(curve) + 1), curve, style, label=label)
    if best is not None:
        best = check_count("best", best, 0)
        label = f"best {xlabel}, {best + 1}"
        axes.axvline(best + 1, color="grey", linestyle=":", label=label)
    logarithmic = not any((curve <= 0).any() for curve in drawn.values())
    axes.set(title=title, xlabel=xlabel, ylabel="loss", yscale="log" if logarithmic else "linear")
    if drawn:
        axes.legend()
    return figure


def churn(refreshes: Sequence[Refresh]) -> Figure:
    """Draw over the steps what the refreshes did.

    Above, the share of A that each exchanged, a curve for each parameter, the first darkest;
    in the middle, the share of all that entered A which came from B∖A; below, the share of the
    weights that was ever in A.

    Args:
        refreshes: Those of a `History`.

    Returns:
        The figure.
    """
    steps = [refresh.step for refresh in refreshes]
    names = list(refreshes[0].exchanges) if refreshes else []
    columns = math.ceil(len(names) / LEGEND_ROWS)
    figure, (upper, middle, lower) = plt.subplots(
        3, sharex=True, figsize=(6.4 + LEGEND_WIDTH * columns, 6.4), layout="constrained"
    )
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for name, shade in zip(names, shades, strict=True):
        exchanged = [refresh.exchanges[name].churn for refresh in refreshes]
        upper.plot(steps, exchanged, label=name, color=shade)
    if names:
        figure.legend(loc="outside right upper", fontsize="small", ncols=columns)
    upper.set(ylabel="share of A exchanged", ylim=(0, None))
    middle.plot(steps, [_promoted(refresh) for refresh in refreshes])
    middle.set(ylabel="of these from B∖A", ylim=(0, 1.05))
    lower.plot(steps, [refresh.exploration_rate for refresh in refreshes])
    lower.set(xlabel="step", ylabel="share ever in A", ylim=(0, 1.05))
    return figure


def _promoted(refresh: Refresh) -> float:
    """Return the share of what entered A that came from B∖A; NaN where nothing entered."""
    entered = sum(exchange.entered for exchange in refresh.exchanges.values())
    promoted = sum(exchange.promoted for exchange in refresh.exchanges.values())
    return promoted / entered if entered else math.nan


def densities(masks: Mapping[str, Masks]) -> Figure:
    """Draw the densities of A and B of every sparse parameter.

    Args:
        masks: Sets by name.

    Returns:
        The figure.
    """
    figure, axes = plt.subplots(figsize=(6.4, 1 + 0.4 * len(masks)), layout="constrained")
    places = np.arange(len(masks))
    kinds = (("B: learns", "B∖A: explored"), ("A: computes", "A: active"))
    for (label, color), field in zip(kinds, ("backward", "forward"), strict=True):
        shares = [float(getattr(sets, field).double().mean()) for sets in masks.values()]
        axes.barh(places, shares, color=COLORS[color], label=label)
    axes.set(xlabel="density", xlim=(0, 1), yticks=places, yticklabels=list(masks))
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def accuracy(
    results: Mapping[str, Mapping[float, Sequence[float]]],
    dense: Sequence[float] = (),
    ylabel: str = "test accuracy",
) -> Figure:
    """Draw what methods reach at each sparsity: means, with the spread of the runs.

    Args:
        results: By method, by forward sparsity (fraction), the result of each run.
        dense: Results of dense runs, drawn as a line.
        ylabel: What the results are.

    Returns:
        The figure; bars reach from the worst run to the best.
    """
    figure, axes = plt.subplots(layout="constrained")
    for method, runs in results.items():
        sparsities = sorted(sparsity for sparsity in runs if len(runs[sparsity]))
        means = np.array([np.mean(runs[s]) for s in sparsities])
        below = means - [min(runs[s]) for s in sparsities]
        above = [max(runs[s]) for s in sparsities] - means
        percent = [100 * s for s in sparsities]
        axes.errorbar(percent, means, (below, above), marker="o", capsize=3, label=method)
    if len(dense):
        axes.axhline(float(np.mean(dense)), color="black", linestyle="--", label="dense")
    axes.set(xlabel="forward sparsity, %", ylabel=ylabel)
    if results or len(dense):
        axes.legend()
    return figure
