"""Figures of the recipes: lines in panels, embeddings, and images of noises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_noisekd.record.plain import figure_text
from hf_noisekd.record.schema import STATISTICS, Record
from hf_noisekd.release.figures import charted_evaluation, curve_points

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


def plot_panels(panels: Sequence[Panel], path: str | Path, *, share_y: bool = False) -> Figure:
    """Plot lines in panels side by side, with one legend for all, save them as a PNG, and return the figure."""
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


def plot_curves(runs: Sequence[Record], path: str | Path) -> None:
    """Plot accuracy in percent against training steps, a line for each run, and save it as a PNG."""
    names = [run.name for run in runs]
    panels = []
    for statistics in STATISTICS:
        panel = Panel({}, f"read with {statistics} statistics", "training steps")
        for run in runs:
            if evaluation := charted_evaluation(run, "accuracy"):
                label = f"{run.name}: {run.model.architecture}" if names.count(run.name) > 1 else str(run.name)
                panel.lines[label] = curve_points(run, evaluation, statistics, "accuracy")
        panels.append(panel)
    panels[0].ylabel = ACCURACY_LABEL
    plot_panels(panels, path, share_y=True)


def plot_accuracy(runs: Sequence[Record], path: str | Path, key: str, xlabel: str, *, log_x: bool = False) -> Figure:
    """Plot the accuracy of distilled students against something in which their runs differ; save and return it.

    Args:
        runs: Records; those that are of no distilled student are left out.
        path: Where to save.
        key: What the runs differ in: an attribute of their provenance.
        xlabel: What it means.
        log_x: Whether to show it on a logarithmic axis.
    """
    lines = {
        f"read with {statistics} statistics": [
            (getattr(run.noisekd, key), run.evaluations[0].scores(statistics)["accuracy"])
            for run in runs
            if run.noisekd is not None
        ]
        for statistics in STATISTICS
    }
    return plot_panels([Panel(lines, xlabel=xlabel, ylabel=ACCURACY_LABEL, log_x=log_x)], path)


def plot_embeddings(embeddings: Mapping[str, tuple], path: str | Path) -> Figure:
    """Plot points of the plane in a panel for each input, coloured by the model's answer; save and return the figure.

    Args:
        embeddings: By title, the points `[N, 2]` and the answers `[N]`.
        path: Where to save.
    """
    figure = Figure(figsize=(4 * len(embeddings), 4), layout="constrained")
    axes = figure.subplots(1, len(embeddings), sharex=True, sharey=True)
    for axis, (title, (points, answers)) in zip(axes, embeddings.items(), strict=True):
        for answer in sorted(set(answers.tolist())):
            axis.scatter(*points[answers == answer].T, s=4, color=f"C{answer}", label=f"answered {answer}")
        axis.set_title(title)
        axis.set_xlabel("first embedding dimension")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right", markerscale=3, fontsize="small")
    axes[0].set_ylabel("second embedding dimension")
    figure.savefig(path, dpi=120)
    return figure


def plot_contact_sheet(images: Mapping[str, torch.Tensor], path: str | Path, *, columns: int = 8) -> Figure:
    """Plot some images of each kind in a row, save them as a PNG, and return the figure.

    Args:
        images: By title, images `[N, C, H, W]` of about zero mean and unit variance; other than three channels are
            shown as the mean in gray.
        path: Where to save.
        columns: Images to show of each, evenly spaced among them.
    """
    figure = Figure(figsize=(columns + 1.6, 1.05 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False)
    for axes, (title, kind) in zip(grid, images.items(), strict=True):
        pixels = (0.5 + 0.25 * (kind if kind.shape[1] == 3 else kind.mean(1, keepdim=True))).clamp(0, 1)
        for index, axis in enumerate(axes):
            axis.imshow(
                pixels[index * len(pixels) // columns].permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1
            )
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=80)
    return figure
