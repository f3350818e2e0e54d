"""The page: one HTML file that loads nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gere.report.figures import MEANINGS, Group, columns, figures, group, shown, signed, table
from gere.report.plots import curve, heat_map, keys_of, trade_offs
from gere.report.reading import labels_of
from gere.report.run import GENERAL, Run
from gere.report.style import STYLE
from gere.report.svg import COLOURS

HEAD = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline'\">"
    f"<title>Training report</title><style>{STYLE}</style></head><body>\n<h1>Training report</h1>\n"
)


def page(runs: Sequence[Run]) -> str:
    """The report of runs, the same text for the same runs.

    Args:
        runs: At least one.

    Returns:
        HTML without scripts, links or images.
    """
    groups, labels = group(runs), labels_of(runs)
    colours = {held.name: index for index, held in enumerate(groups)}
    by_folder = {str(run.folder): label for run, label in zip(runs, labels, strict=True)}
    sequences = [(run, label) for run, label in zip(runs, labels, strict=True) if run.tasks]
    general, replay = (
        [curve(key, runs, labels, colours) for key in keys_of(runs, prefix)] for prefix in (GENERAL, "gere/")
    )
    parts = [
        _summary(runs, groups),
        _legend(groups),
        _plots("Task score against general ability", [*trade_offs(groups, by_folder, colours)], TRADE_OFF),
        _plots("General ability over the steps", general) or _note(NO_GENERAL),
        _plots("Accuracy after each task", [heat_map(*pair) for pair in sequences], INVALID),
        _plots("Replay over the steps", replay),
        _section("Runs", _runs(runs, labels)),
    ]
    return HEAD + "\n".join(part for part in parts if part) + "\n</body></html>\n"


TRADE_OFF = (
    "Small: a run. Large: the mean of a name. Bars: its 95 % intervals over the seeds, without a cap where they go on "
    "past the plot. Hollow: before training. Runs that are not at their end are left out."
)
INVALID = "Small: the share of answers that are none of the task's options, from 0.005 on."
NO_GENERAL = "No run has logged general/loss: add GeneralAbilityCallback to its trainer."


def _summary(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    half = [run for run in runs if run.state]
    text = f"{_count(len(runs), 'run')} of {_count(len(groups), 'name')}."
    if half:
        text += f" {_count(len(half), 'run')} not at the end yet: shown, and not counted in any mean."
    rows = table(groups)
    meanings = "".join(f"<dt>{key}</dt><dd>{MEANINGS[key]}</dd>" for key in rows[0] if key in MEANINGS)
    return (
        f"<p>{text}</p>\n<h2>Means over seeds</h2>\n{_table(rows)}"
        '<p class="note">± is half the 95 % interval of Student\'s t over the seeds; none for a single one.</p>'
        f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    )


def _runs(runs: Sequence[Run], labels: Sequence[str]) -> str:
    found = [figures(run) for run in runs]
    keys = columns([{key: value for key, value in row.items() if value == value} for row in found])
    rows = [["run", "folder", "state", *keys]]
    for run, label, row in zip(runs, labels, found, strict=True):
        cells = [shown(row.get(key, float("nan")), sign=signed(key)) for key in keys]
        rows.append([label, str(run.folder), run.state or "at its end", *cells])
    return _table(rows, texts=3)


def _table(rows: Sequence[Sequence[str]], texts: int = 2) -> str:
    """A table whose first columns hold text."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    classes = [' class="text"' if index < texts else "" for index in range(len(head))]
    top = "".join(f'<th scope="col"{name}>{cell}</th>' for name, cell in zip(classes, head, strict=True))
    lines = []
    for first, *others in body:
        cells = "".join(f"<td{name}>{cell}</td>" for name, cell in zip(classes[1:], others, strict=True))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>\n')
    return (
        f'<div class="scroll"><table class="wide"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _legend(groups: Sequence[Group]) -> str:
    items = []
    for index, held in enumerate(groups):
        dashed = " dashed" if index // COLOURS % 2 else ""
        items.append(f'<li class="c{index % COLOURS}{dashed}"><i></i>{html.escape(held.name)}</li>')
    return f'<h2>Colours</h2>\n<ul class="legend">{"".join(items)}</ul>'


def _plots(title: str, plots: Sequence[str], note: str = "") -> str:
    found = [plot for plot in plots if plot]
    return _section(title, f'<div class="plots">{"".join(found)}</div>{_note(note)}') if found else ""


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{body}" if body else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
