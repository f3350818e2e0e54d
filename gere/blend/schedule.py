"""When base decay pulls, and how hard: a function of the steps of the training."""

from __future__ import annotations

import math

# Between 2 pulls and one in each step the curves do not differ (docs/strategies.md).
MOST_PULLS = 20


def pulls(decay: float, steps: int) -> dict[int, float]:
    """Compute the pulls of a training.

    A pull takes the weights a part d of the way to the base weights. Pulls cut the training into equal stretches. None
    comes after the last step, so that what was just learned stays.

    Args:
        decay: c of `gere_config.base_decay`. What was learned at the start of the training fades to exp(-c).
        steps: Optimizer steps N of the training.

    Returns:
        For each step that is followed by a pull, 1 to N - 1, its d. The product of all 1 - d is exp(-c).

    Example:
        >>> {step: round(part, 3) for step, part in pulls(0.7, 5).items()}
        {1: 0.161, 2: 0.161, 3: 0.161, 4: 0.161}
    """
    count = min(MOST_PULLS, steps - 1)
    if decay == 0 or count < 1:
        return {}
    part = -math.expm1(-decay / count)
    return {round(number * steps / (count + 1)): part for number in range(1, count + 1)}
