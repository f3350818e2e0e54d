"""Orders in which the replay rows of a step have similar lengths, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MEGA_BLOCK = 256  # rows that are sorted together: enough for similar lengths, few enough to change company


def grouped(order: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Bring rows of similar lengths together; each stays in the order once.

    The order is cut into blocks of about `MEGA_BLOCK` rows, each is sorted by length and cut into groups, and the
    groups are dealt to their places.

    Args:
        order: A permutation of the rows, int [n].
        lengths: Length of each row, int [n].
        sizes: Rows of each group, in the order of the groups; they add up to n.
        places: A permutation of the groups, by which they are filled.

    Returns:
        The rows of all groups, one after another, int [n]; within a group in no particular order.

    Example:
        >>> order, lengths = np.array([2, 0, 3, 1]), np.array([9, 1, 2, 8])
        >>> grouped(order, lengths, sizes=np.array([2, 2]), places=np.array([1, 0])).tolist()
        [3, 0, 1, 2]
    """
    blocks = np.array_split(order, max(1, round(len(order) / MEGA_BLOCK)))
    rows = np.concatenate([block[np.argsort(lengths[block], kind="stable")] for block in blocks])
    ends = np.cumsum(sizes)
    taken = sizes[places]
    shift = (ends - sizes)[places] - (np.cumsum(taken) - taken)
    found = np.empty_like(rows)
    found[np.repeat(shift, taken) + np.arange(len(rows))] = rows
    return found


def step_sizes(num_rows: int, number: int, rows_per_step: int) -> np.ndarray:
    """How the steps cut a permutation, where steps run through one after another without a gap.

    Args:
        num_rows: Rows of a permutation.
        number: Permutations before this one.
        rows_per_step: Rows of a step.

    Returns:
        Rows of each step that are in this permutation, int [steps]; of the first and the last one perhaps a part.

    Example:
        >>> step_sizes(10, 1, 4).tolist()  # the first permutation left 2 rows for its last step
        [2, 4, 4]
    """
    first = min(num_rows, -number * num_rows % rows_per_step)
    whole, last = divmod(num_rows - first, rows_per_step)
    return np.array([size for size in (first, *[rows_per_step] * whole, last) if size])


def by_length(rows: Sequence[int], lengths: Sequence[int] | np.ndarray) -> list[int]:
    """Rows in the order of their lengths; rows of one length stay in theirs."""
    return sorted(rows, key=lambda row: lengths[row])
