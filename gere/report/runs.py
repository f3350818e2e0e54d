"""A run as the report sees it: the matrix of a sequence, and what was logged over the steps."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GENERAL, REPLAY = "general/", "gere/"
DERIVED = ("_se", "_change")

Curves = dict[str, dict[float, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: As it was named.
        name: What its seeds have in common: `name` of `sequence.json`, or the name of the folder.
        seed: Its seed; `None` for a plain training.
        tasks: Names of the T tasks; none for a plain training.
        scores: Accuracy after each of the R tasks that were trained, on each task: (R, T), NaN where not evaluated.
        invalid: Share of invalid answers, of the same shape.
        before: Accuracy of the untouched model, (T,).
        before_invalid: Share of its invalid answers, (T,).
        joint: Whether all tasks were trained at once (R is at most 1), as an upper bound.
        general_before: General ability of the untouched model, by name without `general/`.
        general_now: The same after the last task that was trained, or at the last step.
        curves: Values over the optimizer steps: by log key, then by step.
        ends: Last step of each task that was trained, up to the first one without a log.
        state: How far it is, if it is not at its end; empty otherwise.
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
    labels = [run.name if names[run.name] == 1 or run.seed is None else f"{run.name}, seed {run.seed}" for run in runs]
    again = Counter(labels)
    return [label if again[label] == 1 else f"{label} ({run.folder})" for label, run in zip(labels, runs, strict=True)]


def add_log(curves: Curves, log: Mapping[str, Any], step: float) -> None:
    """Add what a log says of replay and general ability; a step that is logged again counts as it was last."""
    for key, value in _numbers(log, (GENERAL, REPLAY)).items():
        curves.setdefault(key, {})[step] = value


def general_of(log: Mapping[str, Any]) -> dict[str, float]:
    """Values of general ability that a log has, by name without `general/`."""
    return {key.removeprefix(GENERAL): value for key, value in _numbers(log, (GENERAL,)).items()}


def number(value: object) -> float | None:
    """Convert a number of JSON to float; give `None` for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _numbers(log: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, float]:
    found = {key: number(log[key]) for key in _measures(log) if key.startswith(prefixes)}
    return {key: value for key, value in found.items() if value is not None}


def _measures(keys: Iterable[str]) -> list[str]:
    """Keys without those of the standard errors and changes of other keys."""
    present = set(keys)
    return [key for key in keys if not any(key.endswith(end) and key.removesuffix(end) in present for end in DERIVED)]
