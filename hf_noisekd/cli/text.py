"""Tables for the terminal."""

from collections.abc import Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header, the first column on the left, all others on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (header, *rows)
    )


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
    rows = [
        [
            f"{statistics} statistics",
            *(f"{values[name]:.2f}" if "%" in units[name] else f"{values[name]:.4f}" for name in columns),
        ]
        for statistics, values in scores.items()
    ]
    return table(["BatchNorm on", *(units[name] for name in columns)], rows)
