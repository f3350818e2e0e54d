"""The page: what `page.html.j2` shows, the same text for the same runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from gere.report.figures import MEANINGS, RESULT, Group, columns, figures, result, shown, table
from gere.report.plots import MARKERS, curves, style_of, trade_offs
from gere.report.runs import GENERAL, REPLAY, Run

LEAST_INVALID = 0.005


def page(groups: Sequence[Group]) -> str:
    """Fill the page for at least one group: HTML without scripts, links or pictures to load."""
    runs = [run for held in groups for run in held.runs]
    means, small = table(groups), table(groups, RESULT)
    small[0] = ["task score (AP)" if cell == "AP" else cell for cell in small[0]]
    styles = [style_of(number) for number in range(len(groups))]
    # `autoescape`, since names of runs and keys of logs are anybody's text. `StrictUndefined`, since a misspelled name
    # in the template would be empty otherwise.
    loader = PackageLoader("gere.report", ".")
    environment = Environment(
        autoescape=True, loader=loader, lstrip_blocks=True, trim_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        runs=len(runs),
        unfinished=sum(1 for run in runs if run.state),
        dates=sorted({run.date for run in runs}),
        result=result(groups),
        small=small,
        # On the page the groups stand side by side, so that each figure has a line with its meaning.
        means=[[*row, MEANINGS.get(row[0], "")] for row in zip(*means, strict=True)],
        legend=[(held.name, style, MARKERS[style.marker]) for held, style in zip(groups, styles, strict=True)],
        trade_offs=list(trade_offs(groups)),
        general=curves(GENERAL, groups),
        heat_maps=[_heat_map(run) for run in runs if run.tasks],
        replay=curves(REPLAY, groups),
        settings=_settings(groups),
        every_run=_every_run(runs),
    )


class Cell(NamedTuple):
    """Accuracy, opacity of the colour behind it and share of invalid answers; empty where there is none."""

    score: str
    shade: str
    invalid: str


def _heat_map(run: Run) -> tuple[str, list[list[str | Cell]]]:
    """Lay out the matrix of a sequence under a caption: after each task (down) the accuracy on each task (across)."""
    rows: list[list[str | Cell]] = [["accuracy on", *run.tasks]]
    tasks = ("all tasks",) if run.joint else run.tasks
    for index, name in enumerate(["before training", *(f"after {task}" for task in tasks)]):
        shares = zip(run.scores[index : index + 1].flat, run.invalid[index : index + 1].flat, strict=True)
        rows.append([name, *(_cell(score, bad) for score, bad in shares)])
    return ": ".join(filter(None, (run.label, run.state))), rows


def _cell(score: float, invalid: float) -> Cell:
    shade = f"{0.6 * score:.2f}" if math.isfinite(score) else ""
    return Cell(shown(score), shade, f"{invalid:.2f}" if invalid >= LEAST_INVALID else "")


def _settings(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Write the settings that all groups have in common, and for each group those in which it differs."""
    found = [held.runs[0].settings for held in groups]
    common = {key: value for key, value in found[0].items() if all(other.get(key) == value for other in found)}
    rows = [("all runs", common)]
    for held, own in zip(groups, found, strict=True):
        rows.append((held.name, {key: value for key, value in own.items() if key not in common}))
    return [(name, "; ".join(f"{key} {_text(own[key])}" for key in own)) for name, own in rows if own]


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _every_run(runs: Sequence[Run]) -> list[list[str]]:
    """Make head and rows of all runs, without figures that no run has."""
    found = [{key: value for key, value in figures(run).items() if not math.isnan(value)} for run in runs]
    keys = columns(found)
    rows = [["run", "folder", "date", "state", *keys]]
    for run, row in zip(runs, found, strict=True):
        cells = [shown(row.get(key, math.nan), key) for key in keys]
        rows.append([run.label, str(run.folder), run.date, run.state or "at its end", *cells])
    return rows
