"""The figures of a run, their means over the seeds of a name, and both as rows of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gere import metrics
from gere.report.runs import Run

LOSS = "loss"
MISSING = "-"
SIGNED = ("BWT", "FWT", "forgetting", "change")  # differences
MEANINGS = {
    "AP": "mean accuracy over the tasks, after the last one",
    "F1 Avg": "harmonic mean of the general accuracy (mean over its sets) and AP",
    "general loss": "held-out loss on general text, nats a token; lower is better",
    "change": "general loss minus that of the untouched model",
    "BWT": "accuracy after the last task minus accuracy just after the task, mean over the earlier tasks",
    "forgetting": "best accuracy since a task was trained minus that after the last task, mean over the earlier tasks",
    "OP": "mean of AP over the sequence: after the first task, after the second, and so on",
    "FWT": "accuracy just before a task is trained minus that of the untouched model, mean over the later tasks",
    "invalid": "share of answers after the last task that are none of a task's options",
}


class Group(NamedTuple):
    """The runs of a name: `runs` are at their end, `means` has the figures that all of them have."""

    name: str
    runs: tuple[Run, ...]
    unfinished: tuple[Run, ...]
    means: dict[str, metrics.Interval]


def figures(run: Run) -> dict[str, float]:
    """Compute all figures of a run by name, NaN where it has none; general accuracies come last, by their set."""
    task = _after_the_last(run, run.scores)
    loss, loss_before = (values.get(LOSS, math.nan) for values in (run.general_now, run.general_before))
    # Tasks that are trained at once have no order, so nothing is forgotten or learned before its turn.
    scores = run.scores[:0] if run.joint else run.scores
    found = {
        "AP": task,
        "F1 Avg": metrics.harmonic_mean(ability(run.general_now), task),
        "OP": metrics.overall_performance(scores),
        "BWT": metrics.backward_transfer(scores),
        "FWT": metrics.forward_transfer(scores, run.before),
        "forgetting": _mean(metrics.forgetting(scores)),
        "invalid": _after_the_last(run, run.invalid),
        "general loss": loss,
        "change": loss - loss_before,
    }
    return found | _accuracies(run.general_now)


def untouched(run: Run) -> dict[str, float]:
    """Compute the figures that a run's model had before training."""
    task = _mean(run.before)
    found = {
        "AP": task,
        "F1 Avg": metrics.harmonic_mean(ability(run.general_before), task),
        "invalid": _mean(run.before_invalid),
        "general loss": run.general_before.get(LOSS, math.nan),
    }
    return found | _accuracies(run.general_before)


def ability(values: Mapping[str, float]) -> float:
    """Compute the general accuracy, the mean over the sets; NaN without one, or if one is no accuracy."""
    found = list(_accuracies(values).values())
    if all(0 <= value <= 1 for value in found):
        return _mean(found)
    return math.nan


def _accuracies(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != LOSS}


def _after_the_last(run: Run, matrix: NDArray[np.float64]) -> float:
    """Return the mean over the trained tasks after the last one."""
    if run.joint and len(matrix):
        return _mean(matrix[-1])  # the one row is of all tasks
    return metrics.average_performance(matrix)


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    if not len(values):
        return math.nan
    return float(np.mean(values))


def group(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their name, in the order in which names come first."""
    groups = []
    for name in dict.fromkeys(run.name for run in runs):
        done = tuple(run for run in runs if run.name == name and not run.state)
        unfinished = tuple(run for run in runs if run.name == name and run.state)
        rows = [figures(run) for run in done]
        means = {}
        for key in columns(rows):
            values = [row.get(key, math.nan) for row in rows]
            # A mean over some of the seeds would stand beside means over all of them.
            if all(map(math.isfinite, values)):
                means[key] = metrics.interval(values)
        groups.append(Group(name, done, unfinished, means))
    return groups


def table(groups: Sequence[Group]) -> list[list[str]]:
    """Make head and rows of the means with their 95 % intervals, without figures that no name has."""
    keys = columns(held.means for held in groups)
    rows = [["name", "seeds", *keys]]
    rows += _rows_before([run for held in groups for run in held.runs], keys)
    for held in groups:
        rows.append([held.name, _seeds(held), *(_cell(held.means.get(key), key) for key in keys)])
    return rows


def columns(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Name the figures that one of the rows has, the known ones first."""
    present: set[str] = set().union(*rows)
    return [key for key in MEANINGS if key in present] + sorted(present - set(MEANINGS))


def shown(value: float, key: str = "") -> str:
    """Write a figure with three digits, a difference with its sign; a dash for one that is not finite."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:+.3f}" if key in SIGNED else f"{value:.3f}"


def _cell(value: metrics.Interval | None, key: str) -> str:
    if value is None:
        return MISSING
    text = shown(value.mean, key)
    if value.size > 1:
        text += f" ± {value.half:.3f}"
    return text


def _seeds(held: Group) -> str:
    seeds = [str(run.seed) for run in held.runs if run.seed is not None]
    left = [run.state if run.seed is None else f"{run.seed}: {run.state}" for run in held.unfinished]
    parts = [", ".join(seeds)]
    if left:
        parts.append(f"not counted: {', '.join(left)}")
    return "; ".join(filter(None, parts)) or MISSING


def _rows_before(runs: Sequence[Run], keys: Sequence[str]) -> list[list[str]]:
    """Make a row of each untouched model, named by its runs where there are several."""
    names: dict[tuple[str, ...], dict[str, None]] = {}
    for run in runs:
        values = untouched(run)
        cells = tuple(shown(values.get(key, math.nan), key) for key in keys)
        if set(cells) - {MISSING}:
            names.setdefault(cells, {})[run.name] = None
    rows = []
    for cells, of in names.items():
        title = "before training" if len(names) == 1 else f"before training: {', '.join(of)}"
        rows.append([title, "", *cells])
    return rows
