"""The page: what `page.html.j2` shows, the same text for the same runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from gere.report.figures import MEANINGS, columns, figures, group, shown, table
from gere.report.plots import COLOURS, curves, trade_offs
from gere.report.runs import GENERAL, REPLAY, Run, labels_of

LEAST_INVALID = 0.005


def page(runs: Sequence[Run]) -> str:
    """Fill the page for at least one run: HTML without scripts, links or pictures to load."""
    groups, labels = group(runs), labels_of(runs)
    colours = {held.name: index for index, held in enumerate(groups)}
    means = table(groups)
    # `autoescape`, since names of runs and keys of logs are anybody's text. `StrictUndefined`, since a misspelled name
    # in the template would be empty otherwise.
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
    """Lay out the matrix of a sequence: after each task (down) the accuracy on each task (across)."""
    rows = [("before training", _cells(run.before, run.before_invalid))]
    tasks = ("all tasks",) if run.joint else run.tasks
    for index, task in enumerate(tasks):
        cells = []
        if index < len(run.scores):
            cells = _cells(run.scores[index], run.invalid[index])
        rows.append((f"after {task}", cells))
    caption = ": ".join(filter(None, (label, run.state)))
    return {"caption": caption, "tasks": run.tasks, "rows": rows}


def _cells(scores: NDArray[Any], invalid: NDArray[Any]) -> list[tuple[str, str, str]]:
    """Write accuracy, opacity of the colour behind it and share of invalid answers; empty where there is none."""
    cells = []
    for score, bad in zip(scores.tolist(), invalid.tolist(), strict=True):
        shade = f"{0.6 * score:.2f}" if math.isfinite(score) else ""
        wrong = f"{bad:.2f}" if bad >= LEAST_INVALID else ""
        cells.append((shown(score), shade, wrong))
    return cells


def _every_run(runs: Sequence[Run], labels: Sequence[str]) -> list[list[str]]:
    """Make head and rows of all runs, without figures that no run has."""
    found = [{key: value for key, value in figures(run).items() if not math.isnan(value)} for run in runs]
    keys = columns(found)
    rows = [["run", "folder", "state", *keys]]
    for run, label, row in zip(runs, labels, found, strict=True):
        cells = [shown(row.get(key, math.nan), key) for key in keys]
        rows.append([label, str(run.folder), run.state or "at its end", *cells])
    return rows
