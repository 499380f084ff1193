"""The figures of an evaluation, drawn by Matplotlib: what a person looks at before believing a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from pipeline.evaluation.curves import PrecisionRecall, Reliability
from pipeline.types import Float32Array, Int64Array

BLUE, RED, GREY = "#2b6cb0", "#c53030", "#b8bfc8"
MANY = 10
"""Up to so many classes each has a colour; of more, the best and the worst are told apart."""
EXTREMES = 3
MAX_FILTERS = 256


def confusion_matrix(confusion: Int64Array, classes: Sequence[str], title: str) -> Figure:
    """Share of each true class (row) that was predicted as each class (column)."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 12:
        for (row, column), count in np.ndenumerate(confusion):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=shade)
    return figure


def weakest_classes(values: Mapping[str, float], metric: str, title: str) -> Figure:
    """A metric of up to forty classes, the weakest at the bottom."""
    ranked = sorted(values.items(), key=lambda entry: entry[1])[:40]
    figure = Figure(figsize=(7, 1 + 0.25 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(ranked)), [value for _, value in ranked], color=BLUE)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set(xlabel=metric, xlim=(0, 1), title=title)
    return figure


def precision_recall(
    curves: Mapping[int, PrecisionRecall],
    classes: Sequence[str],
    title: str,
    average_precision: Mapping[int, float] | None = None,
) -> Figure:
    """One curve for each class; of many, the three best and the three worst stand out and the others are grey.

    Args:
        average_precision: of each class, where it goes by another rule than that of `curves`.
    """
    averages = average_precision or {label: curve.average_precision for label, curve in curves.items()}
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    ranked = sorted(curves, key=lambda label: -averages[label])
    named = ranked if len(ranked) <= MANY else ranked[:EXTREMES] + ranked[-EXTREMES:]
    palette = mpl.colormaps["tab10"]
    for label in ranked:
        if label not in named:
            _draw_curve(axes, curves[label], color=GREY, linewidth=0.6, alpha=0.6, zorder=1)
    for place, label in enumerate(named):
        text = f"{averages[label]:.3f}  {_short(classes[label])}"
        last = len(ranked) > MANY and place >= EXTREMES
        _draw_curve(axes, curves[label], color=palette(place), linestyle="--" if last else "-", label=text, zorder=2)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.set_title(f"{title}: mean average precision {np.mean([*averages.values()]):.4f}")
    heading = "average precision" if len(ranked) <= MANY else f"{EXTREMES} best, {EXTREMES} worst (dashed)"
    figure.legend(loc="outside right center", title=heading, frameon=False)
    axes.grid(alpha=0.25)
    return figure


def shares(values: Mapping[str, float], title: str) -> Figure:
    """Shares of a whole, in the order that they are given, each with its number."""
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(values)), [*values.values()], color=BLUE)
    axes.bar_label(bars, [f"{value:.1%}" for value in values.values()], padding=3)
    axes.set_yticks(range(len(values)), [*values])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), title=title)
    return figure


def calibration(found: Reliability, title: str) -> Figure:
    """The reliability diagram: accuracy by confidence, the gap between them, and how many images each bin holds."""
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    num_bins = len(found.counts)
    width, held = 1 / num_bins, found.counts > 0
    middle = (np.arange(num_bins) + 0.5) * width
    axes.bar(middle[held], found.accuracy[held], width * 0.94, color=BLUE, label="accuracy")
    gap = found.confidence - found.accuracy
    axes.bar(
        *(middle[held], gap[held], width * 0.94, found.accuracy[held]),
        color="none", edgecolor=RED, hatch="///", linewidth=0.8, label="gap to confidence",
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="perfect")
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"{title}: expected calibration error {found.ece:.4f}")
    axes.legend(loc="upper left", frameon=False)
    below.bar(middle, found.counts / max(found.counts.sum(), 1), width * 0.94, color=GREY)
    below.set(xlabel="confidence", ylabel="share of images", ylim=(0, None))
    return figure


def first_filters(network: nn.Module, title: str) -> Figure | None:
    """The kernels of the first convolution as small pictures; None where there is none.

    Three input channels are shown as colours, one as grey, others by their mean; zero is middle grey, and each filter
    is stretched to its own largest weight.
    """
    first = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None:
        return None
    pictures = filter_pictures(first.weight.detach().float().cpu().numpy())[:MAX_FILTERS]
    columns = math.ceil(math.sqrt(len(pictures) * 1.6))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(columns * 0.6 + 0.4, rows * 0.6 + 0.8), layout="constrained")
    figure.suptitle(f"{title}: {len(pictures)} filters of {first.kernel_size[0]} x {first.kernel_size[1]}")
    grid = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for axes in grid:
        axes.set_axis_off()
    for axes, picture in zip(grid, pictures, strict=False):
        axes.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
    return figure


def range_test(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], title: str) -> Figure:
    """The loss over rising learning rates, single batches and their running mean."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color="0.75", label="batch")
    axes.plot(rates, smoothed, label="running mean")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
    axes.set_ylim(0.9 * min(smoothed), 1.1 * max(smoothed))
    axes.legend(frameon=False)
    return figure


def filter_pictures(weights: Float32Array) -> Float32Array:
    """Weights [N, C, H, W] as RGB [N, H, W, 3] in 0..1."""
    if weights.shape[1] != 3:
        weights = weights.mean(axis=1, keepdims=True).repeat(3, axis=1)
    largest = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    pictures: Float32Array = 0.5 + weights / np.maximum(2 * largest, 1e-12)
    return pictures.transpose(0, 2, 3, 1)


def _draw_curve(axes: Axes, curve: PrecisionRecall, **style: object) -> None:
    """As steps: precision at a threshold holds until recall grows again."""
    recall, precision = np.concatenate([[0.0], curve.recall]), np.concatenate([curve.precision[:1], curve.precision])
    axes.step(recall, precision, where="pre", **style)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}\u2026"
