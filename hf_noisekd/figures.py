"""Figures for recipes and model cards. Needs matplotlib, from the extra `recipes`."""

from collections.abc import Mapping
from pathlib import Path


def plot_curves(record: Mapping, path: str | Path) -> None:
    """Plot test accuracy against training steps, a line for each run, and save it as a PNG.

    Args:
        record: What a recipe writes to `results.json`; see [`hf_noisekd.recipe`].
        path: Where to save.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, statistics in zip(axes, ("running", "batch"), strict=True):
        key = f"eval_{statistics}_accuracy"
        for run in record["runs"]:
            points = [(entry["step"], entry[key]) for entry in run["curve"] if key in entry]
            points.append((run["steps"], run[statistics]["accuracy"]))
            axis.plot(*zip(*sorted(set(points)), strict=True), marker="o", markersize=3, label=run["name"])
        axis.set_title(f"read with {statistics} statistics")
        axis.set_xlabel("training steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=120)
