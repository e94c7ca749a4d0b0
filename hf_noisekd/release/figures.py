"""Figures for recipes and model cards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hf_noisekd.training.evaluation import STATISTICS

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


def plot_panels(panels: Sequence[Panel], path: str | Path, *, share_y: bool = False) -> Figure:
    """Plot lines in panels side by side, with one legend for all, save them as a PNG, and return the figure."""
    figure = Figure(figsize=(4.5 * max(len(panels), 1.4), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=share_y, squeeze=False)[0]
    handles = {}
    several = len({name for panel in panels for name in panel.lines}) > 10
    palette = colormaps["tab20" if several else "tab10"].colors
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


def plot_curves(runs: Sequence[Mapping], path: str | Path, metric: str = "accuracy") -> None:
    """Plot a metric against training steps, a line for each run, and save it as a PNG.

    Args:
        runs: Records of [`hf_noisekd.release.record`], each with a `name`, `steps`, `evaluations` and the `curve`.
        path: Where to save.
        metric: What to plot, in percent: `accuracy`, or `agreement` with the teacher.
    """
    names = [run["name"] for run in runs]
    panels = []
    for statistics in STATISTICS:
        panel = Panel({}, f"read with {statistics} statistics", "training steps")
        for run in runs:
            if evaluation := charted_evaluation(run, metric):
                key = f"{evaluation.get('log_prefix')}_{statistics}_{metric}"
                points = {entry["step"]: entry[key] for entry in run["curve"] if key in entry}
                points[evaluation.get("step", 0)] = evaluation[statistics][metric]
                several = names.count(run["name"]) > 1
                label = f"{run['name']}: {run['model']['architecture']}" if several else run["name"]
                panel.lines[label] = list(points.items())
        panels.append(panel)
    panels[0].ylabel = ACCURACY_LABEL if metric == "accuracy" else "agreement with the teacher (%)"
    plot_panels(panels, path, share_y=True)


def plot_accuracy(runs: Sequence[Mapping], path: str | Path, key: str, xlabel: str, *, log_x: bool = False) -> Figure:
    """Plot the accuracy of distilled students against something in which their runs differ; save and return it.

    Args:
        runs: Records of [`hf_noisekd.release.record`]; those that are of no distilled student are left out.
        path: Where to save.
        key: What the runs differ in: a key of their section `noisekd`.
        xlabel: What it means.
        log_x: Whether to show it on a logarithmic axis.
    """
    students = [run for run in runs if "noisekd" in run]
    lines = {
        f"read with {statistics} statistics": [
            (run["noisekd"][key], run["evaluations"][0][statistics]["accuracy"]) for run in students
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
