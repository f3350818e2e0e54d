"""The figures of a run, their means over the seeds of a group, and both as rows of text."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gere import metrics
from gere.report.runs import CHANGE, INTERVAL, LOSS, Run

MISSING = "-"
CHANGED = "general change"
SIGNED = ("BWT", "FWT", "forgetting", CHANGED)  # differences
MEANINGS = {
    "AP": "task score: mean accuracy over the tasks, after the last one",
    "eval loss": "last loss on the evaluation set of a plain training; lower is better",
    CHANGED: "general loss minus that of the base model, nats a token; above 0, general ability was lost",
    "general loss": "held-out loss on general text, nats a token; lower is better",
    "general accuracy": "mean accuracy over the general sets",
    "F1 Avg": "harmonic mean of the general accuracy and AP",
    "BWT": "accuracy after the last task minus accuracy just after the task, mean over the earlier tasks",
    "forgetting": "best accuracy since a task was trained minus that after the last task, mean over the earlier tasks",
    "OP": "mean of AP over the sequence: after the first task, after the second, and so on",
    "FWT": "accuracy just before a task is trained minus that of the base model, mean over the later tasks",
    "invalid": "share of answers after the last task that are none of a task's options",
}
# The figures a report begins with: what it is in a sentence, its unit, and which end is better.
RESULT = {
    "AP": ("task score", "", max),
    "eval loss": ("loss on the task", "", min),
    CHANGED: ("general change", " nats a token", min),
}


class Group(NamedTuple):
    """Runs that differ only in seed and folder; `means` has the figures that all finished ones have."""

    name: str
    runs: list[Run]
    means: dict[str, metrics.Interval]

    @property
    def done(self) -> list[Run]:
        """The runs that are at their end."""
        return [run for run in self.runs if not run.state]


def figures(run: Run) -> dict[str, float]:
    """Compute all figures of a run by name, NaN where it has none; general accuracies come last, by their set."""
    sets = {name: value for name, value in run.general_now.items() if name not in (LOSS, CHANGE, INTERVAL)}
    # A measure of one's own may be no accuracy, and then there is no mean over the sets.
    general = _mean([*sets.values()]) if all(0 <= value <= 1 for value in sets.values()) else math.nan
    task = _after_the_last(run, run.scores)
    # Tasks that are trained at once have no order, so nothing is forgotten or learned before its turn.
    scores = run.scores[:0] if run.joint else run.scores[1:]
    found = {
        "AP": task,
        "eval loss": run.eval_loss,
        CHANGED: run.general_now.get(CHANGE, math.nan),
        "general loss": run.general_now.get(LOSS, math.nan),
        "general accuracy": general,
        "F1 Avg": metrics.harmonic_mean(general, task),
        "BWT": metrics.backward_transfer(scores),
        "forgetting": _mean(metrics.forgetting(scores)),
        "OP": metrics.overall_performance(scores),
        "FWT": metrics.forward_transfer(scores, run.scores[0]),
        "invalid": _after_the_last(run, run.invalid),
    }
    return found | sets


def untouched(run: Run) -> dict[str, float]:
    """Compute the figures that a run's model had before training."""
    # As if the untouched model were that of all tasks.
    scores, invalid = run.scores[[0, 0]], run.invalid[[0, 0]]
    general = {name: value for name, value in run.general_before.items() if name != CHANGE}
    before = dataclasses.replace(run, scores=scores, invalid=invalid, general_now=general, joint=True)
    return figures(dataclasses.replace(before, eval_loss=math.nan))


def _after_the_last(run: Run, shares: NDArray[np.float64]) -> float:
    if run.joint:
        return _mean(shares[1:][-1:])  # the one row is of all tasks
    return metrics.average_performance(shares[1:])


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    return float(np.mean(values)) if np.size(values) else math.nan


def group(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in seed and folder, in the order in which they come first, and label each run."""
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind, []).append(run)
    names = [_common_name(alike) for alike in kinds.values()]
    groups = []
    for name, alike in zip(names, kinds.values(), strict=True):
        if names.count(name) > 1:
            name = f"{name} ({alike[0].folder})"
        seeds, labelled = [run.seed for run in alike], []
        for run in alike:
            label = name if len(alike) == 1 else f"{name}, seed {run.seed}"
            if seeds.count(run.seed) > 1:
                label = f"{name} ({run.folder})"
            labelled.append(dataclasses.replace(run, label=label))
        groups.append(Group(name, labelled, _means([run for run in labelled if not run.state])))
    return groups


def _common_name(runs: Sequence[Run]) -> str:
    """Return the name of the runs, or what the names of their folders have in common."""
    names = sorted({run.name for run in runs})
    if len(names) == 1:
        return names[0]
    # Of `gere-0` and `gere-1`, or `gere-seed10` and `gere-seed11`, that is `gere`. By letters, not by parts of a path.
    common = re.sub(r"([-_. ]+(seed|s))?[-_. ]*\d*$", "", os.path.commonprefix(names))  # noqa: RUF071
    return common or names[0]


def _means(done: Sequence[Run]) -> dict[str, metrics.Interval]:
    rows = [figures(run) for run in done]
    means = {}
    for key in columns(rows):
        values = [row.get(key, math.nan) for row in rows]
        # A mean over some of the seeds would stand beside means over all of them.
        if all(map(math.isfinite, values)):
            means[key] = metrics.interval(values)
    if len(done) == 1 and CHANGED in means:
        # One run has no interval over seeds, but its texts may have given it one.
        half = done[0].general_now.get(INTERVAL, math.nan)
        means[CHANGED] = means[CHANGED]._replace(half=half)
    return means


def result(groups: Sequence[Group]) -> str:
    """Say which group has the best task score and which the lowest general change; empty if none is known."""
    sentences: list[str] = []
    alone: dict[str, list[str]] = {}
    for key, (what, unit, best) in RESULT.items():
        found = [(held.means[key], held) for held in groups if key in held.means]
        # Scores on other tasks cannot be compared.
        if len(found) > 1 and len({held.runs[0].tasks for _, held in found}) == 1:
            top = best((value for value, _ in found), key=lambda value: value.mean)
            names = " and ".join(held.name for value, held in found if value.mean == top.mean)
            rank = "highest" if best is max else "lowest"
            sentences.append(f"The {rank} {what} is that of {names}, {_cell(top, key)}{unit}.")
        else:
            for value, held in found:
                alone.setdefault(held.name, []).append(f"a {what} of {_cell(value, key)}{unit}")
    return " ".join(sentences + [f"{name} has {' and '.join(parts)}." for name, parts in alone.items()])


def table(groups: Sequence[Group], only: Iterable[str] | None = None) -> list[list[str]]:
    """Make head and rows of the means with their 95 % intervals, without figures that no group has."""
    keys = [key for key in columns(held.means for held in groups) if only is None or key in only]
    rows = [["group", *keys, "seeds"]]
    rows += _rows_before([(held.name, run) for held in groups for run in held.done], keys)
    for held in groups:
        rows.append([held.name, *(_cell(held.means.get(key), key) for key in keys), _seeds(held)])
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
    if math.isfinite(value.half):
        text += f" ± {value.half:.3f}"
    return text


def _seeds(held: Group) -> str:
    seeds = [str(run.seed) for run in held.done if run.seed is not None]
    left = [run.state if run.seed is None else f"{run.seed}: {run.state}" for run in held.runs if run.state]
    parts = [", ".join(seeds)]
    if left:
        parts.append(f"not counted: {', '.join(left)}")
    return "; ".join(filter(None, parts)) or MISSING


def _rows_before(runs: Sequence[tuple[str, Run]], keys: Sequence[str]) -> list[list[str]]:
    """Make a row of each base model, named by its groups where there are several."""
    names: dict[tuple[str, ...], dict[str, None]] = {}
    for name, run in runs:
        values = untouched(run)
        cells = tuple(shown(values.get(key, math.nan), key) for key in keys)
        if set(cells) - {MISSING}:
            names.setdefault(cells, {})[name] = None
    rows = []
    for cells, of in names.items():
        title = "before training" if len(names) == 1 else f"before training: {', '.join(of)}"
        rows.append([title, *cells, ""])
    return rows
