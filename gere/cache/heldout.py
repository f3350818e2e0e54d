"""Which texts of a set are measured and never replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
# One of so many texts is held out at most.
MOST_HELDOUT = 10


def held_out(texts: Sequence[str], most: int) -> list[int]:
    """Choose the places of the texts that are measured: at most a tenth, evenly spread, and none that comes twice.

    Example:
        >>> held_out(["a", "b", "b", *map(str, range(27))], 2)
        [0, 16]
    """
    times = Counter(texts)
    single = [place for place, text in enumerate(texts) if times[text] == 1]
    return spread(single, min(most, len(texts) // MOST_HELDOUT, len(single)))


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take at most `count` items, evenly spread and with the first one."""
    if count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]
