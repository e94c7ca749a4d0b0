"""Figures of the paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from hf_noisekd.record.schema import STATISTICS, Record
from hf_noisekd.release.figures import ACCURACY_LABEL, Panel, plot_panels


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
