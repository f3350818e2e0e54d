"""Several timings as one figure: the middle one, and how far they spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median of repeated measurements, the least and the greatest."""

    median: float
    least: float
    most: float

    def show(self, digits: int = 3, factor: float = 1.0) -> str:
        """`median (least to most)`, each times `factor`."""
        return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*(factor * value for value in self), d=digits)


def spread(values: Sequence[float]) -> Spread:
    """Spread of repeated measurements."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of the ratios of measurements that were taken side by side."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def interleaved(sides: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Measure every side once in each round, so that a slow moment of the machine meets all of them.

    Args:
        sides: Each measures once.
        repeats: Rounds that count; one before them warms up.

    Returns:
        By side, its measurements.
    """
    rounds = [[side() for side in (sides if number % 2 else sides[::-1])] for number in range(repeats + 1)]
    ordered = [row if number % 2 else row[::-1] for number, row in enumerate(rounds)][1:]
    return [list(column) for column in zip(*ordered, strict=True)]
