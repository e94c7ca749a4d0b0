"""Figures of trainings: curves, and how often the teacher answers each class.

matplotlib is imported when a figure is drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_noisekd.release.record import STATISTICS, Evaluation, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BARS = 30
ACCURACY_LABEL = "test accuracy (%)"


@dataclass
class Panel:
    """One coordinate system of a figure.

    Attributes:
        lines: Points by the name of their line: `(x, y)`, or `(x, y, spread)` for an error bar.
        title: What stands above.
        xlabel: What the horizontal axis shows, with its unit.
        ylabel: Likewise the vertical one.
        log_x: Whether the horizontal axis is logarithmic; it is marked at the points then.
        log_y: Whether the vertical axis is.
        marker: Whether the points are marked.
    """

    lines: dict[str, Sequence[tuple[float, ...]]]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    log_x: bool = False
    log_y: bool = False
    marker: bool = True


def plot_panels(panels: Sequence[Panel], path: str | Path, *, share_y: bool = False) -> "Figure":
    """Plot lines in panels side by side, with one legend for all, save them as a PNG, and return the figure."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.5 * max(len(panels), 1.4), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=share_y, squeeze=False)[0]
    handles: dict[str, Any] = {}
    several = len({name for panel in panels for name in panel.lines}) > 10
    palette = [colormaps["tab20" if several else "tab10"](index) for index in range(20 if several else 10)]
    for axis, panel in zip(axes, panels, strict=True):
        for name, points in panel.lines.items():
            if not points:
                continue
            x, y, *spread = zip(*sorted(points), strict=True)
            color = handles[name].lines[0].get_color() if name in handles else palette[len(handles) % len(palette)]
            handles[name] = axis.errorbar(
                x, y, *spread, color=color, marker="o" if panel.marker else None, markersize=3, capsize=3
            )
        if panel.log_x:
            marks = sorted({point[0] for points in panel.lines.values() for point in points})
            axis.set_xscale("log")
            axis.set_xticks(marks, [f"{mark:,}" for mark in marks], rotation=90 if len(marks) > 8 else 0)
            axis.minorticks_off()
        elif all(isinstance(point[0], int) for points in panel.lines.values() for point in points):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.log_y:
            axis.set_yscale("log")
        axis.set_title(panel.title)
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
        axis.grid(alpha=0.3)
    columns = max(1, min(len(handles), int(130 / (8 + max(map(len, handles), default=1)))))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize="small")
    figure.savefig(path, dpi=120)
    return figure


def plot_curves(runs: Sequence[Record], path: str | Path, metric: str = "accuracy") -> None:
    """Plot a metric against training steps, a line for each run, and save it as a PNG.

    Args:
        runs: Records with names.
        path: Where to save.
        metric: What to plot, in percent: `accuracy`, or `agreement` with the teacher.
    """
    names = [run.name for run in runs]
    panels = []
    for statistics in STATISTICS:
        panel = Panel({}, f"read with {statistics} statistics", "training steps")
        for run in runs:
            if evaluation := charted_evaluation(run, metric):
                key = f"{evaluation.log_prefix}_{statistics}_{metric}"
                points = {entry["step"]: entry[key] for entry in run.curve if key in entry}
                points[evaluation.step] = evaluation.scores(statistics)[metric]
                several = names.count(run.name) > 1
                label = f"{run.name}: {run.model.architecture}" if several else str(run.name)
                panel.lines[label] = list(points.items())
        panels.append(panel)
    panels[0].ylabel = ACCURACY_LABEL if metric == "accuracy" else "agreement with the teacher (%)"
    plot_panels(panels, path, share_y=True)


def charted_evaluation(run: Record, metric: str) -> Evaluation | None:
    """Return the first evaluation of a run that has a metric and was also made in its training, if there was any."""
    return next(
        (
            evaluation
            for evaluation in run.evaluations
            if metric in evaluation.batch and (evaluation.log_prefix is not None or not run.curve)
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
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

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
