"""Pictures: what is drawn, and how it is labelled."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import topkast_func as tk
from topkast_func import Masks
from topkast_func.report import plots

FORWARD = torch.tensor([[True, False, False, False], [False, False, False, True]])
BACKWARD = torch.tensor([[True, True, False, False], [False, True, True, True]])
LEVELS = [[2, 1, 0, 0], [0, 1, 1, 2]]


def _texts(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def _curves(figure: Figure) -> dict[str, list[list[Any]]]:
    """Return the coordinates of each line by its label."""
    return {
        str(line.get_label()): [
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
        ]
        for line in figure.axes[0].get_lines()
    }


def test_sets_draws_the_level_of_each_entry() -> None:
    figure = plots.sets(Masks(FORWARD, BACKWARD), "first layer")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    (image,) = axes.images
    assert np.asarray(image.get_array()).tolist() == LEVELS
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "first layer",
        "input",
        "output",
    )


def test_sets_draws_each_set_in_the_colour_of_its_legend() -> None:
    figure = plots.sets(Masks(FORWARD, BACKWARD))
    (image,) = figure.axes[0].images
    legend = figure.axes[0].get_legend()
    assert legend is not None
    drawn = image.to_rgba(np.arange(3.0))
    assert drawn.tolist() == [list(patch.get_facecolor()) for patch in legend.get_patches()]
    assert len(np.unique(drawn, axis=0)) == 3


def test_sets_names_the_share_of_each_set() -> None:
    texts = _texts(plots.sets(Masks(FORWARD, BACKWARD)))
    assert texts == ["Θ∖B: at rest (38%)", "B∖A: explored (38%)", "A: active (25%)"]


def test_sets_keeps_its_colours_where_a_set_is_empty() -> None:
    everything = torch.ones(2, 2, dtype=torch.bool)
    figure = plots.sets(Masks(everything, everything))
    (image,) = figure.axes[0].images
    assert (image.norm.vmin, image.norm.vmax) == (0, 2)
    assert _texts(figure)[2] == "A: active (100%)"


def test_sets_lays_further_axes_side_by_side() -> None:
    forward = FORWARD.reshape(2, 2, 1, 2)
    figure = plots.sets(Masks(forward, BACKWARD.reshape(2, 2, 1, 2)))
    (image,) = figure.axes[0].images
    assert np.asarray(image.get_array()).tolist() == LEVELS


def test_losses_draws_both_curves_over_epochs_from_1() -> None:
    figure = plots.losses([4.0, 2.0, 1.0], [5.0, 3.0, 2.5])
    assert isinstance(figure, Figure)
    assert _curves(figure) == {
        "training": [[1, 2, 3], [4.0, 2.0, 1.0]],
        "validation": [[1, 2, 3], [5.0, 3.0, 2.5]],
    }
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert _texts(figure) == ["training", "validation"]


def test_losses_draws_others_dashed_the_best_epoch_and_a_title() -> None:
    figure = plots.losses([4.0, 2.0], [5.0, 3.0], others={"dense": [3.0, 1.0]}, best=1, title="T")
    (axes,) = figure.axes
    styles = {str(line.get_label()): line.get_linestyle() for line in axes.get_lines()}
    assert styles == {"training": "-", "validation": "-", "dense": "--", "best epoch, 2": ":"}
    assert _curves(figure)["dense"] == [[1, 2], [3.0, 1.0]]
    assert _curves(figure)["best epoch, 2"][0] == [2, 2]
    assert axes.get_title() == "T"
    assert _texts(figure) == [*styles]


@pytest.mark.parametrize("validation", [[], [math.nan, math.nan]])
def test_losses_leaves_out_a_validation_that_there_is_not(validation: list[float]) -> None:
    figure = plots.losses([4.0, 2.0], validation)
    assert _curves(figure) == {"training": [[1, 2], [4.0, 2.0]]}
    assert _texts(figure) == ["training"]


def test_losses_keeps_a_curve_with_a_gap() -> None:
    figure = plots.losses([4.0, math.nan, 2.0], [3.0, 3.0, 3.0])
    curves = _curves(figure)
    assert figure.axes[0].get_yscale() == "log"
    assert curves["training"][0] == [1, 2, 3]
    assert math.isnan(curves["training"][1][1])


def test_losses_takes_any_array() -> None:
    figure = plots.losses(np.array([4.0, 2.0]), torch.tensor([5.0, 3.0]).tolist())
    assert _curves(figure)["training"] == [[1, 2], [4.0, 2.0]]


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_losses_that_are_not_all_positive_are_drawn_on_a_linear_scale(lowest: float) -> None:
    figure = plots.losses([2.0, lowest], [2.0, 1.0])
    assert figure.axes[0].get_yscale() == "linear"
    assert _curves(figure)["training"] == [[1, 2], [2.0, lowest]]


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_losses_of_a_run_without_any_loss_is_an_empty_picture(values: list[float]) -> None:
    assert _curves(plots.losses(values, values)) == {}


def test_each_call_draws_a_figure_of_its_own() -> None:
    first, second = plots.losses([1.0], [1.0]), plots.losses([2.0], [2.0])
    assert first is not second
    assert _curves(first)["training"] == [[1], [1.0]]


REFRESHES = [
    tk.Refresh(10, {"a": tk.Exchange(3, 2, 0.3), "b": tk.Exchange(1, 1, 0.1)}, 0.2),
    tk.Refresh(20, {"a": tk.Exchange(2, 1, 0.2), "b": tk.Exchange(0, 0, 0.0)}, 0.4),
]


def test_churn_draws_each_parameter_and_the_exploration_rate() -> None:
    figure = plots.churn(REFRESHES)
    upper, middle, lower = figure.axes
    curves = {line.get_label(): line.get_xydata() for line in upper.lines}
    np.testing.assert_array_equal(curves["a"], [[10, 0.3], [20, 0.2]])
    np.testing.assert_array_equal(curves["b"], [[10, 0.1], [20, 0.0]])
    np.testing.assert_array_equal(middle.lines[0].get_xydata(), [[10, 0.75], [20, 0.5]])
    np.testing.assert_array_equal(lower.lines[0].get_xydata(), [[10, 0.2], [20, 0.4]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_churn_of_many_parameters_leaves_room_for_its_curves() -> None:
    exchanges = {f"encoder.layers.{i}.linear.weight": tk.Exchange(3, 2, 0.3) for i in range(60)}
    figure = plots.churn([tk.Refresh(10, exchanges, 0.2), tk.Refresh(20, exchanges, 0.4)])
    figure.draw_without_rendering()
    assert all(axes.get_position().width * figure.get_figwidth() > 3 for axes in figure.axes)
    colours = {str(line.get_color()) for line in figure.axes[0].lines}
    assert len(colours) == len(exchanges)


def test_losses_of_steps_need_no_validation() -> None:
    (axes,) = plots.losses([2.0, 1.0], xlabel="step").axes
    assert (len(axes.lines), axes.get_xlabel()) == (1, "step")


def test_pictures_of_nothing_warn_of_nothing() -> None:
    plots.accuracy({})
    plots.churn([tk.Refresh(step=3, exchanges={}, exploration_rate=0.0)])


def test_churn_of_no_refresh_is_an_empty_picture() -> None:
    assert not plots.churn([]).axes[0].lines


def test_densities_of_a_dense_network_are_an_empty_picture() -> None:
    assert not plots.densities({}).axes[0].get_yticklabels()


def test_densities_draws_a_over_b_for_each_parameter() -> None:
    theta = {"a": torch.randn(10, 10), "b": torch.randn(5, 4)}
    masks = tk.compute_masks(theta, tk.TopKastConfig(0.75, 0.5, sparse=["a", "b"]))
    axes = plots.densities(masks).axes[0]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[0.5, 0.5], [0.25, 0.25]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_accuracy_draws_means_with_the_worst_and_the_best() -> None:
    axes = plots.accuracy({"x": {0.9: [1.0, 4.0, 1.0], 0.8: [5.0]}}, dense=[7.0, 9.0]).axes[0]
    line, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [[80, 5], [90, 2]])
    np.testing.assert_allclose(bars.get_segments()[1], [[90, 1], [90, 4]])
    dense = next(line for line in axes.lines if line.get_label() == "dense")
    np.testing.assert_array_equal(dense.get_ydata(), [8.0, 8.0])


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0)])
def test_masks_of_nothing_are_named(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks of shape .* have nothing to draw"):
        plots.sets(Masks(mask, mask))
