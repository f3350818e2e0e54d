"""A run as the report sees it: the matrix of a sequence, and what was logged over the steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GENERAL, REPLAY = "general/", "gere/"
LOSS, CHANGE, INTERVAL = "loss", "change", "change_interval"
# Of the same name as another value of the log: its standard error, and its change since the start.
DERIVED = ("_se", "_change")
RENAMED = {"general/loss_change": GENERAL + CHANGE, "gere/forgetting": "gere/replay_change"}

Curves = dict[str, dict[float, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder: a sequence of T tasks of which R are trained, or a plain training without tasks.

    Attributes:
        name: Name that the run was given, or that of its folder.
        kind: What its seeds have in common, and no other run has.
        label: Name that no other run has, once the runs are grouped.
        date: Day of its last measurement, in UTC.
        settings: Settings by their dotted names, without those in which seeds differ.
        scores: Accuracy of the untouched model, and after each trained task, on each task, (1 + R, T), NaN where not
            evaluated.
        invalid: Share of invalid answers, (1 + R, T).
        joint: Whether all tasks were trained at once (R is at most 1), as an upper bound.
        eval_loss: Last loss on the evaluation set of a plain training.
        general_before: General ability of the untouched model, by name without `general/`.
        general_now: The same after the last trained task, or at the last step.
        curves: Values over the optimizer steps: by log key, then by step.
        ends: Last step of each trained task, up to the first one without a log.
        state: How far it is; empty at its end.
    """

    folder: Path
    name: str
    kind: str
    label: str = ""
    seed: int | None = None
    date: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    scores: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros((1, 0)))
    invalid: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros((1, 0)))
    joint: bool = False
    eval_loss: float = math.nan
    general_before: Mapping[str, float] = dataclasses.field(default_factory=dict)
    general_now: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curves: Curves = dataclasses.field(default_factory=dict)
    ends: Sequence[float] = ()
    state: str = ""


def curves_of(logs: Sequence[tuple[float, Mapping[str, Any]]]) -> Curves:
    """Collect what logs with their steps say of replay and general ability; of a step, what was logged last."""
    curves: Curves = {}
    for step, log in logs:
        for key, entry in log.items():
            derived = any(key.endswith(end) and key.removesuffix(end) in log for end in DERIVED)
            value = number(entry)
            if key.startswith((GENERAL, REPLAY)) and value is not None and (key in RENAMED or not derived):
                curves.setdefault(key, {})[step] = value
    for old, new in RENAMED.items():
        if old in curves:
            # Both names are logged for a while, and they are one curve.
            curves.setdefault(new, curves.pop(old))
    return curves


def general_at(curves: Curves, last: bool) -> dict[str, float]:
    """Return general ability at the last step or at step 0, by name without `general/`."""
    found = {}
    for key, values in curves.items():
        step = max(values) if last else 0.0
        if key.startswith(GENERAL) and step in values:
            found[key.removeprefix(GENERAL)] = values[step]
    return found


def number(value: object) -> float | None:
    """Convert a number of JSON to float; give `None` for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any size
        return math.inf
