"""`gere sequence`: train one model over a sequence of tasks, or resume one that was killed."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any


def add_sequence(commands: Any) -> None:
    """Add the command `sequence` to those of `gere`."""
    text = "Train one model over a sequence of tasks, evaluate all after each; the same command resumes after a kill."
    parser = commands.add_parser("sequence", help="train and evaluate over a sequence of tasks", description=text)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="YAML or JSON with the settings")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, also SECTION.NAME=VALUE")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from gere.continual import read_sequence, run

    settings = read_sequence(options.config, options.set)
    # A library prints nothing; its command shows where the sequence is, and where it resumes.
    logger, handler = logging.getLogger("gere.continual"), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        matrix = run(settings)
    finally:
        logger.removeHandler(handler)
    names = ["before", *(matrix.tasks if settings.mode == "sequence" else ["all tasks"])]
    accuracies: list[Any] = [matrix.before, *matrix.accuracy]
    rows = [["after", *matrix.tasks, "general change"]]
    start = matrix.general[0].get("general/loss")
    for name, row, now in zip(names, accuracies, matrix.general, strict=True):
        shares = ["-" if share is None else f"{share:.4f}" for share in row]
        change, loss = "-", now.get("general/loss")
        if loss is not None and start is not None:
            change = f"{loss - start:+.4f}"
        rows.append([name, *shares, change])
    width = max(len(row[0]) for row in rows)
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(max(len(head), 8)) for head, cell in zip(rows[0][1:], cells, strict=True)]
        lines.append("  ".join([name.ljust(width), *aligned]))
    sys.stdout.write("\n".join([*lines, f"Written: {Path(settings.out) / 'matrix.json'}"]) + "\n")
    return 0
