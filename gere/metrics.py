"""Figures of a sequence of tasks: what was learned, what was lost, and how sure a mean over seeds is.

In a matrix `a`, `a[i, j]` is the score on task j after training on task i, the tasks in the order of training. It is
a list of lists or an array of shape (R, T), for T tasks of which R are trained, with `None` or NaN where nothing was
evaluated. A figure that needs such an entry, or more tasks than were trained, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gere.errors import ConfigError

Matrix = NDArray[np.float64] | Sequence[Sequence[float | None]]
Vector = NDArray[np.float64] | Sequence[float | None]


class Interval(NamedTuple):
    """A mean and how far it may be off.

    Attributes:
        mean: Arithmetic mean; NaN of nothing.
        half: Half the width of the interval around it; NaN of fewer than two values.
        size: Number of values.
    """

    mean: float
    half: float
    size: int


def average_performance(a: Matrix) -> float:
    """Compute AP: the mean score over the tasks after the last one, sum_j a[R-1, j] / R over j < R.

    With all tasks trained (R = T) this is the mean of the last row: AP of GeRe (arXiv 2508.04676), A_T of Chaudhry et
    al. (arXiv 1801.10112), and what Recurrent-KIF (arXiv 2502.17510) calls OP.
    """
    scores = _matrix(a)
    # Tasks that are not trained yet are left out. `-1:` takes a matrix without rows, too.
    return _mean(scores[-1:, : len(scores)])


def overall_performance(a: Matrix) -> float:
    """Compute OP: the mean over the steps of the sequence of the mean over the tasks so far, sum_i AP_i / R.

    The average incremental accuracy of Rebuffi et al. (arXiv 1611.07725).
    """
    scores = _matrix(a)
    return _mean([_mean(row[: i + 1]) for i, row in enumerate(scores)])


def backward_transfer(a: Matrix) -> float:
    """Compute BWT: the mean over j < R-1 of a[R-1, j] - a[j, j]; below 0 where later tasks cost earlier ones.

    Lopez-Paz and Ranzato (arXiv 1706.08840). NaN for one task.
    """
    scores = _matrix(a)
    rows = len(scores)
    if not rows:
        return math.nan
    return _mean(scores[-1, : rows - 1] - np.diag(scores)[: rows - 1])


def forward_transfer(a: Matrix, before: Vector) -> float:
    """Compute FWT: the mean over 0 < j < R of a[j-1, j] - before[j]; above 0 where earlier tasks help a later one.

    Lopez-Paz and Ranzato (arXiv 1706.08840), with the untouched model in place of a random one. NaN for one task.

    Args:
        a: Scores; those just above the diagonal are read.
        before: Scores of the untouched model, T of them.

    Raises:
        ConfigError: If `before` is not a list of T numbers.
    """
    scores, start = _matrix(a), np.asarray(before, dtype=np.float64)
    if start.shape != scores.shape[1:]:
        raise _unusable("before", f"{scores.shape[1]} scores, one of each task", start.shape)
    return _mean(np.diag(scores, 1)[: max(len(scores) - 1, 0)] - start[1 : len(scores)])


def forgetting(a: Matrix) -> NDArray[np.float64]:
    """Compute the forgetting of each earlier task j < R-1: its best score before the last task, minus that after it.

    Chaudhry et al. (arXiv 1801.10112), over the time since the task was trained.

    Returns:
        R - 1 differences, max over j <= i < R-1 of a[i, j], minus a[R-1, j]; below 0 where a task still got better.
    """
    scores = _matrix(a)
    rows = len(scores)
    return np.array([scores[j : rows - 1, j].max() - scores[-1, j] for j in range(rows - 1)], dtype=np.float64)


def harmonic_mean(general: float, task: float) -> float:
    """Compute F1 Avg, 2 g t / (g + t), of general ability and task score; 60.78 and 74.48 give 66.94.

    GeRe (arXiv 2508.04676).

    Args:
        general: Accuracy on general questions, in the unit of `task`.
        task: AP.

    Returns:
        The harmonic mean; NaN if one is NaN, 0 if one is 0.

    Raises:
        ConfigError: If one is below 0 or infinite.
    """
    for name, value in (("general", general), ("task", task)):
        if value < 0 or math.isinf(value):
            raise _unusable(name, "a number of at least 0", value)
    if math.isnan(general) or math.isnan(task):
        return math.nan
    if general == 0 or task == 0:
        return 0.0
    return 2 / (1 / general + 1 / task)


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Compute the mean of independent runs with the half width of Student's interval, t(n - 1) times s / sqrt(n).

    Args:
        values: One value of each seed.
        level: Probability that the interval of normal values covers their expected value.

    Raises:
        ConfigError: If the level does not lie between 0 and 1.
    """
    if not 0 < level < 1:
        raise _unusable("level", "a probability between 0 and 1", level)
    size = len(values)
    if size < 2:
        return Interval(_mean(values), math.nan, size)
    spread = float(np.std(np.asarray(values, dtype=np.float64), ddof=1))
    return Interval(_mean(values), student_t(level, size - 1) * spread / math.sqrt(size), size)


def student_t(level: float, freedom: int) -> float:
    """Compute the t with P(|T| < t) = level, T of Student's distribution.

    Bisection on theta = atan(t / sqrt(freedom)), in which that probability is a finite sum (Abramowitz and Stegun,
    26.7.3 and 26.7.4). `freedom` is at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):  # halves the range to the last bit of a float64
        middle = (low + high) / 2
        if _within(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _within(theta: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) tan(theta))."""
    if freedom == 1:
        return 2 / math.pi * theta
    odd = freedom % 2
    term = total = math.cos(theta) ** odd
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(theta) ** 2
        total += term
    total *= math.sin(theta)
    if odd:
        return 2 / math.pi * (theta + total)
    return total


def _matrix(a: Matrix) -> NDArray[np.float64]:
    try:
        scores = np.asarray(a, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _unusable("a", "a matrix of numbers, a row for each task that was trained", error) from error
    if scores.ndim == 1 and not scores.size:
        return scores.reshape(0, 0)  # NumPy gives an empty list one dimension
    if scores.ndim != 2 or len(scores) > scores.shape[1]:
        raise _unusable("a", "a row for each task that was trained, a column for each task", scores.shape)
    return scores


def _mean(values: NDArray[np.float64] | Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _unusable(where: str, expected: str, found: Any) -> ConfigError:
    return ConfigError(
        "A figure cannot be computed.",
        where=where,
        expected=expected,
        found=found,
        fix="Hand over the scores as gere sequence writes them in matrix.json.",
    )
