"""`gere sequence`: train one model over a sequence of tasks, or resume one that was killed."""

from __future__ import annotations

import argparse
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
    matrix = run(settings)
    names = matrix.tasks
    if settings.mode == "multitask":
        names = ["all tasks"]
    rows: list[tuple[str, list[Any]]] = [*zip(names, matrix.accuracy, strict=True)]
    if None not in matrix.before:
        rows.insert(0, ("before", matrix.before))
    width = max(map(len, ["all tasks", *matrix.tasks]))
    lines = [f"{'after':<{width}}  " + "  ".join(f"{name:>8}" for name in matrix.tasks)]
    for name, accuracies in rows:
        lines.append(f"{name:<{width}}  " + "  ".join(f"{value:>8.4f}" for value in accuracies))
    sys.stdout.write("\n".join([*lines, f"Written: {Path(settings.out) / 'matrix.json'}"]) + "\n")
    return 0
