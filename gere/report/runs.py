"""A run as the report sees it: the matrix of a sequence, and what was logged over the steps."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GENERAL, REPLAY = "general/", "gere/"
DERIVED = ("_se", "_change")

Curves = dict[str, dict[float, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder: a sequence of T tasks of which R are trained, or a plain training without tasks and seed.

    Attributes:
        name: What its seeds have in common: `name` of `sequence.json`, or the name of the folder.
        scores: Accuracy after each trained task on each task, (R, T), NaN where not evaluated.
        invalid: Share of invalid answers, (R, T).
        before: Accuracy of the untouched model, (T,).
        before_invalid: Share of its invalid answers, (T,).
        joint: Whether all tasks were trained at once (R is at most 1), as an upper bound.
        general_before: General ability of the untouched model, by name without `general/`.
        general_now: The same after the last trained task, or at the last step.
        curves: Values over the optimizer steps: by log key, then by step.
        ends: Last step of each trained task, up to the first one without a log.
        state: How far it is; empty at its end.
    """

    folder: Path
    name: str
    seed: int | None = None
    tasks: tuple[str, ...] = ()
    scores: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    invalid: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    before: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0))
    before_invalid: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0))
    joint: bool = False
    general_before: Mapping[str, float] = dataclasses.field(default_factory=dict)
    general_now: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curves: Curves = dataclasses.field(default_factory=dict)
    ends: Sequence[float] = ()
    state: str = ""


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Give each run a label that no other has: its name, with its seed or its folder where that is needed."""
    names = Counter(run.name for run in runs)
    labels = [run.name for run in runs]
    for index, run in enumerate(runs):
        if names[run.name] > 1 and run.seed is not None:
            labels[index] = f"{run.name}, seed {run.seed}"
    again = Counter(labels)
    for index, run in enumerate(runs):
        if again[labels[index]] > 1:
            labels[index] += f" ({run.folder})"
    return labels


def add_log(curves: Curves, log: Mapping[str, Any], step: float) -> None:
    """Add what a log says of replay and general ability; a step that is logged again counts as it was last."""
    for key, value in _numbers(log, GENERAL, REPLAY).items():
        curves.setdefault(key, {})[step] = value


def general_of(log: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of general ability in a log, by name without `general/`."""
    return {key.removeprefix(GENERAL): value for key, value in _numbers(log, GENERAL).items()}


def number(value: object) -> float | None:
    """Convert a number of JSON to float; give `None` for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any size
        return math.inf


def _numbers(log: Mapping[str, Any], *prefixes: str) -> dict[str, float]:
    """Return the numbers of a log under some prefixes, without standard errors and changes of other keys."""
    found = {}
    for key in log:
        derived = any(key.endswith(end) and key.removesuffix(end) in log for end in DERIVED)
        value = number(log[key])
        if key.startswith(prefixes) and not derived and value is not None:
            found[key] = value
    return found
