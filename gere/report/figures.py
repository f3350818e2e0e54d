"""The figures of a run, their means over the seeds of a name, and both as rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gere import metrics
from gere.report.runs import Run

LOSS = "loss"
MISSING = "-"
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
    """The runs of a name.

    Attributes:
        name: Their name.
        runs: Those at their end, over which the means go.
        unfinished: The others.
        means: Interval of each figure that all of `runs` have.
    """

    name: str
    runs: tuple[Run, ...]
    unfinished: tuple[Run, ...]
    means: dict[str, metrics.Interval]


def ability(values: Mapping[str, float]) -> float:
    """Compute the general accuracy, the mean over the sets; NaN without one, or if one is no accuracy."""
    found = [value for name, value in values.items() if name != LOSS]
    return float(np.mean(found)) if found and all(0 <= value <= 1 for value in found) else math.nan


def figures(run: Run) -> dict[str, float]:
    """Compute all figures of a run by name, NaN where it has none; general accuracies come last, by their set."""
    task = _after_the_last(run, run.scores)
    losses = [entry.get(LOSS, math.nan) for entry in (run.general_before, run.general_now)]
    scores = run.scores[:0] if run.joint else run.scores
    lost = metrics.forgetting(scores)
    found = {
        "AP": task,
        "F1 Avg": metrics.harmonic_mean(ability(run.general_now), task),
        "OP": metrics.overall_performance(scores),
        "BWT": metrics.backward_transfer(scores),
        "FWT": metrics.forward_transfer(scores, run.before),
        "forgetting": _mean(lost),
        "invalid": _after_the_last(run, run.invalid),
        "general loss": losses[1],
        "change": losses[1] - losses[0],
    }
    return found | {name: value for name, value in run.general_now.items() if name != LOSS}


def _after_the_last(run: Run, matrix: NDArray[np.float64]) -> float:
    """Mean over the tasks after the last one, which of tasks that are trained at once are all of them."""
    return _mean(matrix[-1]) if run.joint and len(matrix) else metrics.average_performance(matrix)


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def untouched(run: Run) -> dict[str, float]:
    """Compute the figures that a run's model had before training."""
    task = _mean(run.before)
    general = ability(run.general_before)
    found = {"AP": task, "F1 Avg": metrics.harmonic_mean(general, task)}
    found |= {"invalid": _mean(run.before_invalid), "general loss": run.general_before.get(LOSS, math.nan)}
    return found | {name: value for name, value in run.general_before.items() if name != LOSS}


def group(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their name, in the order in which names come first."""
    return [
        _group(name, [run for run in runs if run.name == name]) for name in dict.fromkeys(run.name for run in runs)
    ]


def _group(name: str, runs: Sequence[Run]) -> Group:
    done = tuple(run for run in runs if not run.state)
    rows = [figures(run) for run in done]
    shared = [key for key in (rows[0] if rows else ()) if all(math.isfinite(row.get(key, math.nan)) for row in rows)]
    means = {key: metrics.interval([row[key] for row in rows]) for key in shared}
    return Group(name, done, tuple(run for run in runs if run.state), means)


def table(groups: Sequence[Group]) -> list[list[str]]:
    """Make head and rows of the means with their 95 % intervals, without figures that no name has."""
    keys = columns([group.means for group in groups])
    rows = [["name", "seeds", *keys]]
    rows += _rows_before([run for group in groups for run in group.runs], keys)
    for held in groups:
        cells = [_cell(held.means[key], signed(key)) if key in held.means else MISSING for key in keys]
        rows.append([held.name, _seeds(held), *cells])
    return rows


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Name the figures that one of the rows has, the known ones first."""
    present = dict.fromkeys(key for row in rows for key in row)
    return [key for key in MEANINGS if key in present] + sorted(key for key in present if key not in MEANINGS)


def shown(value: float, *, sign: bool = False) -> str:
    """Write a figure with three digits; a dash for one that is not finite."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def signed(key: str) -> bool:
    """Tell whether a figure is a difference."""
    return key in ("BWT", "FWT", "forgetting", "change")


def _cell(value: metrics.Interval, sign: bool) -> str:
    return shown(value.mean, sign=sign) + (f" ± {value.half:.3f}" if value.size > 1 else "")


def _seeds(held: Group) -> str:
    seeds = ", ".join(str(run.seed) for run in held.runs if run.seed is not None)
    left = ", ".join(run.state if run.seed is None else f"{run.seed}: {run.state}" for run in held.unfinished)
    return "; ".join(part for part in (seeds, f"not counted: {left}" if left else "") if part) or MISSING


def _rows_before(runs: Sequence[Run], keys: Sequence[str]) -> list[list[str]]:
    """The untouched model: a row of each that there is, named by its runs where there are several."""
    names: dict[tuple[str, ...], dict[str, None]] = {}
    for run in runs:
        values = untouched(run)
        cells = tuple(shown(values.get(key, math.nan)) for key in keys)
        if set(cells) - {MISSING}:
            names.setdefault(cells, {})[run.name] = None
    title = "before training"
    return [[title if len(names) == 1 else f"{title}: {', '.join(of)}", "", *cells] for cells, of in names.items()]
