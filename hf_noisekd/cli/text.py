"""What the terminal shows: tables, and the log."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence


@contextlib.contextmanager
def showing_log(in_options: Callable[[str], str]) -> Iterator[None]:
    """Context in which the first process prints what the package logs, such as where a preprocessing comes from.

    `in_options` returns a message with the options of the command.
    """

    class InOptions(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return in_options(super().format(record))

    logger, handler = logging.getLogger("hf_noisekd"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(InOptions())
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


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
