"""The page: what `page.html.j2` shows, the same text for the same runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from gere.report.figures import MEANINGS, columns, figures, group, shown, signed, table
from gere.report.plots import COLOURS, curves, trade_offs
from gere.report.runs import GENERAL, REPLAY, Run, labels_of

LEAST_INVALID = 0.005


def page(runs: Sequence[Run]) -> str:
    """Fill the page.

    Args:
        runs: At least one.

    Returns:
        HTML without scripts, links or pictures to load.

    Raises:
        MissingPackageError: If there is something to draw and matplotlib is not installed.
    """
    groups, labels = group(runs), labels_of(runs)
    colours = {held.name: index for index, held in enumerate(groups)}
    means = table(groups)
    loader = PackageLoader("gere.report", ".")
    environment = Environment(
        autoescape=True, loader=loader, lstrip_blocks=True, trim_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        runs=len(runs),
        unfinished=sum(1 for run in runs if run.state),
        means=means,
        meanings={key: MEANINGS[key] for key in means[0] if key in MEANINGS},
        names=list(colours),
        colours=len(COLOURS),
        trade_offs=list(trade_offs(groups, colours)),
        general=curves(GENERAL, runs, labels, colours),
        heat_maps=[_heat_map(run, label) for run, label in zip(runs, labels, strict=True) if run.tasks],
        replay=curves(REPLAY, runs, labels, colours),
        every_run=_every_run(runs, labels),
    )


def _heat_map(run: Run, label: str) -> Mapping[str, Any]:
    """The matrix of a sequence: after each task (down) the accuracy on each task (across)."""
    rows = [("before training", _cells(run.before, run.before_invalid))]
    for index, task in enumerate(["all tasks"] if run.joint else run.tasks):
        there = index < len(run.scores)
        rows.append((f"after {task}", _cells(run.scores[index], run.invalid[index]) if there else []))
    return {"caption": f"{label}: {run.state}" if run.state else label, "tasks": run.tasks, "rows": rows}


def _cells(scores: NDArray[Any], invalid: NDArray[Any]) -> list[tuple[str, str, str]]:
    """Accuracy, opacity of the colour behind it and share of invalid answers as text; empty where there is none."""
    cells = []
    for score, bad in zip(scores.tolist(), invalid.tolist(), strict=True):
        shade = f"{0.6 * score:.2f}" if math.isfinite(score) else ""
        cells.append((shown(score), shade, f"{bad:.2f}" if bad >= LEAST_INVALID else ""))
    return cells


def _every_run(runs: Sequence[Run], labels: Sequence[str]) -> list[list[str]]:
    """Head and rows of all runs, without figures that no run has."""
    found = [figures(run) for run in runs]
    keys = columns([{key: value for key, value in row.items() if not math.isnan(value)} for row in found])
    rows = [["run", "folder", "state", *keys]]
    for run, label, row in zip(runs, labels, found, strict=True):
        cells = [shown(row.get(key, math.nan), sign=signed(key)) for key in keys]
        rows.append([label, str(run.folder), run.state or "at its end", *cells])
    return rows
