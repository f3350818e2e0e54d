"""Which share of the way from base to tuned weights to take, from what was measured along the line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gere.config import require
from gere.errors import ConfigError
from gere.evaluation.general import GeneralChange

# Shares are hundredths: general loss moves by less than its interval between two of them.
STEP = 0.01


class Point(NamedTuple):
    """What was measured at one share.

    Attributes:
        share: a in base + a (tuned - base).
        general: Loss on general texts, and its change from share 0; `None` if there are no texts.
        task_loss: Loss on the task, in nats a token; `None` if there is no task.
    """

    share: float
    general: GeneralChange | None
    task_loss: float | None


def grid(points: int) -> list[float]:
    """Return evenly spread shares, from 1 down to 0.

    Example:
        >>> grid(5)
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    require(points >= 2, "points", "a whole number of at least 2", points)
    return [round(1 - number / (points - 1), 6) for number in range(points)]


def within(general: GeneralChange, budget: float) -> bool:
    """Return whether a change is surely within a budget: the change plus its 95 % interval is at most that."""
    return general.change + general.interval <= budget


def largest_within(
    measure: Callable[[float], GeneralChange], budget: float, shares: Sequence[float]
) -> tuple[float, GeneralChange]:
    """Find the largest share whose change is within a budget, as `within` tells.

    Args:
        measure: Gives the general change at a share, against share 0. It is called once for each share that is asked.
        budget: Largest general change, in nats a token, 0 or more.
        shares: Shares to ask first. They are taken from the largest down to the first within, then halved towards the
            one above it down to 0.01.

    Returns:
        The share and its change. Share 0 is the base model, which is always within.

    Raises:
        ConfigError: If the budget is no number of 0 or more.
    """
    require_budget(budget)
    high: float | None = None
    low, found = 0.0, None
    for share in sorted({*shares, 0.0}, reverse=True):
        general = measure(share)
        if share == 0 or within(general, budget):
            low, found = share, general
            break
        high = share
    assert found is not None  # noqa: S101 (share 0 is always asked)
    while high is not None and high - low > STEP + 1e-9:
        middle = round((low + high) / 2, 2)
        general = measure(middle)
        if within(general, budget):
            low, found = middle, general
        else:
            high = middle
    return low, found


def choose(points: Sequence[Point], budget: float | None, by_task: bool) -> Point:
    """Choose one of the measured points.

    Args:
        points: What was measured, in any order.
        budget: Points whose general change is not within it are left out, but for share 0; `None` for all points.
        by_task: Take the point with the least task loss, and of equal ones that with the smaller share. Otherwise the
            largest share is taken.

    Raises:
        ConfigError: If no point is left, or nothing finite was measured where it is needed.
    """
    left = list(points)
    if budget is not None:
        require_budget(budget)
        left = [point for point in left if point.share == 0 or (point.general and within(point.general, budget))]
    if by_task:
        left = [point for point in left if point.task_loss is not None and math.isfinite(point.task_loss)]
    if not left:
        raise ConfigError(
            "None of the measured shares can be chosen.",
            where="the line from base to tuned weights",
            expected="a share within the budget, with a finite task loss if that decides",
            found=f"{len(points)} shares, none of them so",
            fix="Measure share 0, too, and with task rows if the task loss decides.",
        )
    if by_task:
        return min(left, key=lambda point: (point.task_loss, point.share))
    return max(left, key=lambda point: point.share)


def require_budget(budget: float) -> None:
    """Refuse a budget that is no number of 0 or more."""
    # NaN compares as False.
    require(budget >= 0, "budget", "a general change in nats a token, 0 or more, such as 0.05", budget)
