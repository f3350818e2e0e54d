"""From values to places in a plot, and the round numbers beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LOGARITHMIC_FROM = 1e3


class Axis(NamedTuple):
    """A range of values.

    Attributes:
        low: Smallest value, or its decimal logarithm.
        high: Largest value, likewise; above `low`.
        logarithmic: Whether equal distances are equal ratios.
    """

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high end."""
        at = math.log10(value) if self.logarithmic else value
        return (at - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Two to six round values within the range; more for many decades."""
        step = _round_step((self.high - self.low) / 5)
        if self.logarithmic:
            step = max(1.0, step)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        marks = [index * step for index in range(first, last + 1)]
        return [10.0**mark for mark in marks] if self.logarithmic else marks


def axis_of(values: Sequence[float], *, wide: bool = False) -> Axis:
    """The axis that shows values, with a little room around them.

    Args:
        values: Finite numbers, at least one.
        wide: Make the axis logarithmic where all are above 0 and their largest is a thousand times the smallest.
    """
    low, high = min(values), max(values)
    logarithmic = wide and low > 0 and high / low > LOGARITHMIC_FROM
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, logarithmic)


def _round_step(width: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))
