"""Orders in which the replay rows of a step have similar lengths, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Rows that are sorted together: enough for similar lengths, few enough that a row meets other rows each time.
MEGA_BLOCK = 256


def grouped(order: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Reorder a permutation of rows, [n], into groups of similar `lengths`, [n].

    The order is cut into blocks of about `MEGA_BLOCK` rows. Each block is sorted by length. The rows fill groups of
    `sizes` in the order of `places`, a permutation of the groups.

    Example:
        >>> order, lengths = np.array([2, 0, 3, 1]), np.array([9, 1, 2, 8])
        >>> grouped(order, lengths, sizes=np.array([2, 2]), places=np.array([1, 0])).tolist()
        [3, 0, 1, 2]
    """
    blocks = np.array_split(order, max(1, round(len(order) / MEGA_BLOCK)))
    rows = np.concatenate([block[np.argsort(lengths[block], kind="stable")] for block in blocks])
    ends = np.cumsum(sizes)
    taken = sizes[places]
    # Without `places` the steps of a block would go from short rows to long ones.
    shift = (ends - sizes)[places] - (np.cumsum(taken) - taken)
    found = np.empty_like(rows)
    found[np.repeat(shift, taken) + np.arange(len(rows))] = rows
    return found


def step_sizes(num_rows: int, number: int, rows_per_step: int) -> np.ndarray:
    """Count the rows of each step in permutation `number`, where steps run through all permutations without a gap.

    Example:
        >>> step_sizes(10, 1, 4).tolist()  # the first permutation left 2 rows for its last step
        [2, 4, 4]
    """
    first = min(num_rows, -number * num_rows % rows_per_step)
    whole, last = divmod(num_rows - first, rows_per_step)
    sizes = np.array([first, *[rows_per_step] * whole, last])
    return sizes[sizes > 0]


def by_length(rows: Sequence[int], lengths: Sequence[int] | np.ndarray) -> list[int]:
    """Sort rows by length; rows of equal length keep their order."""
    return sorted(rows, key=lambda row: lengths[row])
