"""Tables for the terminal."""

from collections.abc import Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header, the first column on the left, all others on the right."""
    columns = []
    for number, column in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in column])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


def scores_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return what [`hf_noisekd.evaluate`] measured as a table."""
    units = {
        "accuracy": "accuracy (%)",
        "top5_accuracy": "top-5 (%)",
        "loss": "loss",
        "agreement": "agreement (%)",
        "kl": "KL from teacher",
    }
    columns = [name for name in units if name in scores["running"]]
    rows = []
    for statistics, values in scores.items():
        cells = [f"{values[name]:.2f}" if "%" in units[name] else f"{values[name]:.4f}" for name in columns]
        rows.append([f"{statistics} statistics", *cells])
    return table(["BatchNorm on", *(units[name] for name in columns)], rows)
