"""Repeated measurements as one figure with its spread, and figures as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median, least and greatest of repeated measurements."""

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
        repeats: Rounds that count. One more before them warms up.

    Returns:
        By side, its measurements.
    """
    found: list[list[float]] = [[] for _ in sides]
    for number in range(repeats + 1):
        places = range(len(sides))
        for place in places if number % 2 else reversed(places):
            value = sides[place]()
            if number:
                found[place].append(value)
    return found


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Make a Markdown table, with a line feed at its end."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
