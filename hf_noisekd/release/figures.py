"""Figures of trainings. matplotlib is imported when one is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_noisekd.record.plain import figure_text
from hf_noisekd.record.schema import STATISTICS, Evaluation, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY_LABEL = "test accuracy (%)"


@dataclass
class Panel:
    """One coordinate system of a figure; a logarithmic horizontal axis is marked at the points.

    `lines` holds points by the name of their line: `(x, y)`, or `(x, y, spread)` for an error bar.
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
    from matplotlib import color_sequences
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.5 * max(len(panels), 1.4), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=share_y, squeeze=False)[0]
    handles: dict[str, Any] = {}
    palette = color_sequences["tab20" if len({name for panel in panels for name in panel.lines}) > 10 else "tab10"]
    for axis, panel in zip(axes, panels, strict=True):
        for name, points in panel.lines.items():
            if not points:
                continue
            x, y, *spread = zip(*sorted(points), strict=True)
            color = handles[name].lines[0].get_color() if name in handles else palette[len(handles) % len(palette)]
            marker = "o" if panel.marker else None
            handles[name] = axis.errorbar(x, y, *spread, color=color, marker=marker, markersize=3, capsize=3)
        if panel.log_x:
            marks = sorted({point[0] for points in panel.lines.values() for point in points})
            axis.set_xscale("log")
            axis.set_xticks(marks, [f"{mark:,}" for mark in marks], rotation=90 if len(marks) > 8 else 0)
            axis.minorticks_off()
        elif all(isinstance(point[0], int) for points in panel.lines.values() for point in points):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.log_y:
            axis.set_yscale("log")
        axis.set(title=figure_text(panel.title), xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.grid(alpha=0.3)
    columns = max(1, min(len(handles), int(130 / (8 + max(map(len, handles), default=1)))))
    figure.legend(
        handles.values(), map(figure_text, handles), loc="outside lower center", ncols=columns, fontsize="small"
    )
    figure.savefig(path, dpi=120)
    return figure


def plot_curves(runs: Sequence[Record], path: str | Path, metric: str = "accuracy") -> None:
    """Plot `accuracy` or `agreement` in percent against training steps, a line for each run, and save it as a PNG."""
    names = [run.name for run in runs]
    panels = []
    for statistics in STATISTICS:
        panel = Panel({}, f"read with {statistics} statistics", "training steps")
        for run in runs:
            if evaluation := charted_evaluation(run, metric):
                key = f"{evaluation.log_prefix}_{statistics}_{metric}"
                points = {entry["step"]: entry[key] for entry in run.curve if {"step", key} <= entry.keys()}
                points[evaluation.step] = evaluation.scores(statistics)[metric]
                label = f"{run.name}: {run.model.architecture}" if names.count(run.name) > 1 else str(run.name)
                panel.lines[label] = list(points.items())
        panels.append(panel)
    panels[0].ylabel = ACCURACY_LABEL if metric == "accuracy" else "agreement with the teacher (%)"
    plot_panels(panels, path, share_y=True)


def charted_evaluation(run: Record, metric: str) -> Evaluation | None:
    """Return the first evaluation of a run that has a metric and was also made in its training, if there was any."""
    for evaluation in run.evaluations:
        if (
            metric in evaluation.batch
            and metric in evaluation.running
            and (evaluation.log_prefix is not None or not run.curve)
        ):
            return evaluation
    return None


def plot_class_balance(
    frequencies: Sequence[float], path: str | Path, label_names: Sequence[str] | None = None
) -> None:
    """Plot the teacher's mean answer to noise, a probability for each class, and save it as a PNG.

    Up to 30 classes are bars with names; more are a line, from the most to the least frequent.
    """
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
    title = f"The teacher's mean answer to the training noise (class balance {entropy:.2f} of 1)"
    axis.set(title=title, ylabel="probability", ylim=(0, 1.25 * max(frequencies)))  # with room for the legend
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if max(frequencies) > 0.05 else 2))
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
