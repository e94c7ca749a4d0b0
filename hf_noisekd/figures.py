"""Figures for recipes and model cards."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .evaluation import STATISTICS

MAX_BARS = 30


def plot_curves(runs: Sequence[Mapping], path: str | Path, metric: str = "accuracy") -> None:
    """Plot a metric against training steps, a line for each run, and save it as a PNG.

    Args:
        runs: Records of [`hf_noisekd.record`], each with a `name`, `steps`, `evaluations` and the `curve`.
        path: Where to save.
        metric: What to plot, in percent: `accuracy`, or `agreement` with the teacher.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, statistics in zip(axes, STATISTICS, strict=True):
        for run in runs:
            if evaluation := charted_evaluation(run, metric):
                name = f"{evaluation.get('log_prefix')}_{statistics}_{metric}"
                points = {entry["step"]: entry[name] for entry in run["curve"] if name in entry}
                points[evaluation.get("step", 0)] = evaluation[statistics][metric]
                axis.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=3, label=run["name"])
        axis.set_title(f"read with {statistics} statistics")
        axis.set_xlabel("training steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)" if metric == "accuracy" else "agreement with the teacher (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=120)


def charted_evaluation(run: Mapping, metric: str) -> Mapping | None:
    """Return the first evaluation of a run that has a metric and was also made in its training, if there was any."""
    return next(
        (
            evaluation
            for evaluation in run["evaluations"]
            if metric in evaluation["batch"] and ("log_prefix" in evaluation or not run["curve"])
        ),
        None,
    )


def plot_class_balance(
    frequencies: Sequence[float], path: str | Path, label_names: Sequence[str] | None = None
) -> None:
    """Plot how often the teacher answers each class to noise, and save it as a PNG.

    Up to 30 classes are bars with names; more are a line, from the most to the least frequent.

    Args:
        frequencies: The teacher's mean answer, a probability for each class.
        path: Where to save.
        label_names: Name of each class.
    """
    count = len(frequencies)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    if count <= MAX_BARS:
        names = label_names or [str(index) for index in range(count)]
        axis.bar(range(count), frequencies)
        long_names = max(map(len, names)) * count > 80
        axis.set_xticks(range(count), names, rotation=40 if long_names else 0, ha="right" if long_names else "center")
    else:
        axis.plot(range(1, count + 1), sorted(frequencies, reverse=True))
        axis.set_xlabel("classes, from the most to the least frequent")
    axis.axhline(1 / count, color="black", linestyle="--", linewidth=1, label="all classes equally often")
    entropy = -sum(p * math.log(p) for p in frequencies if p > 0) / math.log(count)
    axis.set_title(f"The teacher's mean answer to the training noise (class balance {entropy:.2f} of 1)")
    axis.set_ylabel("probability")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if max(frequencies) > 0.05 else 2))
    axis.set_ylim(0, 1.25 * max(frequencies))  # room for the legend
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
