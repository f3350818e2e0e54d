"""`gere sequence`: trains one model over a sequence of tasks, and goes on with one that was killed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command `sequence` to those of `gere`."""
    text = "Train one model over a sequence of tasks, evaluate all after each; the same command goes on after a kill."
    parser = commands.add_parser("sequence", help="train and evaluate over a sequence of tasks", description=text)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="YAML or JSON with the settings")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, also SECTION.NAME=VALUE")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from gere.continual.settings import read_sequence

    settings = read_sequence(options.config, options.set)
    from gere.continual import run

    matrix = run(settings)
    width = max(map(len, ["all tasks", *matrix.tasks]))
    names = ["all tasks"] if settings.mode == "multitask" else matrix.tasks
    rows: list[tuple[str, list[Any]]] = [] if None in matrix.before else [("before", [*matrix.before])]
    rows += zip(names, matrix.accuracy, strict=True)
    lines = [f"{'after':<{width}}  " + "  ".join(f"{name:>8}" for name in matrix.tasks)]
    lines += [f"{name:<{width}}  " + "  ".join(f"{value:>8.4f}" for value in row) for name, row in rows]
    sys.stdout.write("\n".join([*lines, f"Written: {Path(settings.out) / 'matrix.json'}"]) + "\n")
    return 0
