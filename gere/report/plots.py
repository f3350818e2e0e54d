"""Which plots a report has, and what is drawn in them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from gere.metrics import interval
from gere.report.figures import LOSS, MISSING, Group, ability, figures, untouched
from gere.report.run import GENERAL, Run
from gere.report.svg import Line, Point, line_plot, point_plot

LARGEST = 1e300
LEAST_INVALID = 0.005
WIDE_FROM = 7
UNITS = {"general/loss": "nats a token", "gere/task_loss": "nats a token", "gere/ce": "nats a token"}


def curve(key: str, runs: Sequence[Run], labels: Sequence[str], colours: Mapping[str, int]) -> str:
    """A figure with the curve of every run that logged `key`; empty if none did.

    Args:
        key: Key of the log.
        runs: All runs.
        labels: Label of each run.
        colours: Number of the colour of each name.
    """
    lines, left = [], []
    for run, label in zip(runs, labels, strict=True):
        found = sorted(run.curves.get(key, {}).items())
        points = [(x, y) for x, y in found if abs(y) < LARGEST]
        lines += [Line(label, colours[run.name], points)] if points else []
        left += [f"{label} ({len(found) - len(points)})"] if len(found) > len(points) else []
    note = f"Values that are not finite are left out: {', '.join(left)}." if left else ""
    if not lines:
        return _figure(key, "", note) if note else ""
    unit = f"{key}, {UNITS[key]}" if key in UNITS else key
    return _figure(key, line_plot(f"{key} over optimizer steps", "optimizer steps", unit, lines, _ends(runs)), note)


def trade_offs(groups: Sequence[Group], labels: Mapping[str, str], colours: Mapping[str, int]) -> Iterator[str]:
    """Figures of AP over general accuracy and over general loss, as far as runs at their end have them.

    Args:
        groups: All groups.
        labels: Label of each run by its folder.
        colours: Number of the colour of each name.
    """
    for about, x_name, measure in (
        ("general accuracy", "general accuracy (right is better)", ability),
        ("general loss", "general loss, nats a token (left is better)", _loss),
    ):
        points = [point for held in groups for point in _points(held, measure, labels, colours[held.name])]
        if points:
            title = f"AP over {about}"
            yield _figure(title, point_plot(title, x_name, "AP (up is better)", points))


def _loss(values: Mapping[str, float]) -> float:
    return values.get(LOSS, math.nan)


def _points(
    held: Group, measure: Callable[[Mapping[str, float]], float], labels: Mapping[str, str], colour: int
) -> list[Point]:
    """Runs of a group, their mean with its intervals, and what their models were before; none if a run lacks them."""
    after = [(measure(run.general_now), figures(run)["AP"]) for run in held.runs]
    if not after or not all(map(_drawable, after)):
        return []
    before = dict.fromkeys((measure(run.general_before), untouched(run)["AP"]) for run in held.runs)
    points = [Point(f"{held.name}, before training", colour, *at, "before") for at in before if _drawable(at)]
    if len(after) > 1:
        names = [labels[str(run.folder)] for run in held.runs]
        points += [Point(name, colour, *at, "run") for name, at in zip(names, after, strict=True)]
    x, y = (interval(values) for values in zip(*after, strict=True))
    return [*points, Point(f"{held.name}, mean of {len(after)}", colour, x.mean, y.mean, "mean", (x.half, y.half))]


def _drawable(point: tuple[float, float]) -> bool:
    return all(abs(value) < LARGEST for value in point)


def heat_map(run: Run, label: str) -> str:
    """The matrix of a run as a table: after each task (down) the accuracy on each task (across).

    Args:
        run: A sequence.
        label: Its label.
    """
    rows = [_heat_row("before training", run.before.tolist(), run.before_invalid.tolist())]
    steps = ("all tasks",) if run.joint else run.tasks
    for task, scores, invalid in zip(steps, run.scores.tolist(), run.invalid.tolist(), strict=False):
        rows.append(_heat_row(f"after {task}", scores, invalid))
    for task in steps[len(run.scores) :]:
        missing = f'<td colspan="{len(run.tasks)}" class="note">not there yet</td>'
        rows.append(f'<tr><th scope="row">after {html.escape(task)}</th>{missing}</tr>')
    head = "".join(f'<th scope="col">{html.escape(task)}</th>' for task in run.tasks)
    caption = html.escape(f"{label}: {run.state}" if run.state else label)
    width = " full" if len(run.tasks) >= WIDE_FROM else ""
    return (
        f'<div class="scroll{width}"><table class="heat wide"><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">accuracy on</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _heat_row(name: str, scores: Sequence[float], invalid: Sequence[float]) -> str:
    cells = []
    for score, bad in zip(scores, invalid, strict=True):
        colour = f' style="background:rgba(var(--heat),{0.6 * score:.2f})"' if math.isfinite(score) else ""
        small = f"<small>{bad:.2f}</small>" if bad >= LEAST_INVALID else ""
        cells.append(f"<td{colour}>{f'{score:.3f}' if math.isfinite(score) else MISSING}{small}</td>")
    return f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>'


def keys_of(runs: Sequence[Run], prefix: str) -> list[str]:
    """Keys with curves, in the order of the alphabet, the general loss first."""
    keys = {key for run in runs for key in run.curves if key.startswith(prefix)}
    return sorted(keys, key=lambda key: (key != GENERAL + LOSS, key))


def _ends(runs: Sequence[Run]) -> Sequence[float]:
    """Steps at which tasks end, if all sequences agree in them."""
    found = {tuple(run.ends) for run in runs}
    return found.pop() if len(found) == 1 else ()


def _figure(caption: str, picture: str, note: str = "") -> str:
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}{below}</figure>"
