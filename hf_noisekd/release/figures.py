"""Figures of a card. matplotlib is imported when one is drawn."""

import math
from collections.abc import Sequence
from pathlib import Path

from hf_noisekd.record.plain import figure_text
from hf_noisekd.record.schema import STATISTICS, Evaluation, Record


def plot_curves(record: Record, evaluation: Evaluation, path: str | Path, metric: str) -> None:
    """Plot `accuracy` or `agreement` in percent against training steps, for both statistics, and save a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, statistics in zip(axes, STATISTICS, strict=True):
        line = axis.plot(*zip(*curve_points(record, evaluation, statistics, metric), strict=True), "-o", markersize=3)
        axis.set(title=f"evaluated with {statistics} statistics", xlabel="training steps")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)" if metric == "accuracy" else "agreement with the teacher (%)")
    figure.legend(line, ["this student"], loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=120)


def curve_points(record: Record, evaluation: Evaluation, statistics: str, metric: str) -> list[tuple[int, float]]:
    """Return the points `(step, percent)` of an evaluation in the course of the training and at its end."""
    key = f"{evaluation.log_prefix}_{statistics}_{metric}"
    points = {entry["step"]: entry[key] for entry in record.curve if {"step", key} <= entry.keys()}
    points[evaluation.step] = evaluation.scores(statistics)[metric]
    return sorted(points.items())


def charted_evaluation(run: Record, metric: str) -> Evaluation | None:
    """Return the first evaluation with a metric, made also during training if there is a curve."""
    for evaluation in run.evaluations:
        if metric in evaluation.batch and (evaluation.log_prefix is not None or not run.curve):
            return evaluation
    return None


def plot_class_balance(
    frequencies: Sequence[float], path: str | Path, label_names: Sequence[str] | None = None
) -> None:
    """Save a PNG of the teacher's mean prediction on noise: a bar for each class, or above 30 a sorted line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    count = len(frequencies)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    if count <= 30:
        names = [figure_text(name) for name in label_names or map(str, range(count))]
        axis.bar(range(count), frequencies)
        long_names = max(map(len, names)) * count > 80
        axis.set_xticks(range(count), names, rotation=40 if long_names else 0, ha="right" if long_names else "center")
    else:
        axis.plot(range(1, count + 1), sorted(frequencies, reverse=True))
        axis.set_xlabel("classes, from the most to the least frequent")
    axis.axhline(1 / count, color="black", linestyle="--", linewidth=1, label="all classes equally often")
    entropy = -sum(p * math.log(p) for p in frequencies if p > 0) / math.log(count)
    title = f"The teacher's mean prediction on the training noise (class balance {entropy:.2f} of 1)"
    axis.set(title=title, ylabel="probability", ylim=(0, 1.25 * max(frequencies)))  # with room for the legend
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
