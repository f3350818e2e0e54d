"""Feature imitation (L1, L2): the state stays near the base state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gere.losses.chunks import wide
from gere.losses.strategy import Seen, Strategy, Tensors

STORED = torch.bfloat16
# Largest difference of a number to the nearest one in bfloat16, as a share of the number.
BF16_ROUNDING = 2.0**-8
# Change of an element of a normalised state by rounding in float32.
LEAST_DIFFERENCE = 1e-6


def l1_distance(state: Tensor, target: Tensor, mask: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """Compute feature imitation (L1): the mean absolute difference to the base state.

    References:
        One of the replay objectives that GeRe, arXiv 2508.04676, compares with TM.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `state` | [b, t, d], float | last-layer state of the current model |
        | `target` | [b, t, d], float | that of the base model |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `tolerance` | number, or broadcast to [b, t, d] | a difference of no more than this counts as none |

    Args:
        state: Current state.
        target: Base state.
        mask: Real tokens.
        tolerance: Rounding of the stored target and noise, to be ignored.

    Returns:
        Mean over the real elements of each row, shape [b], float32 (float64 for a float64 state).

    Relations:
        Pushes every element with the same force, however near it is. L2 pushes harder the farther an element is, TM
        pushes only elements outside their region.

    Example:
        >>> l1_distance(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2), torch.ones(1, 1))
        tensor([2.])
    """
    return _mean_over_elements(_difference(state, target, mask, tolerance).abs(), mask)


def l2_distance(state: Tensor, target: Tensor, mask: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """Compute feature imitation (L2): the mean squared difference to the base state.

    References:
        One of the replay objectives that GeRe, arXiv 2508.04676, compares with TM.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `state` | [b, t, d], float | last-layer state of the current model |
        | `target` | [b, t, d], float | that of the base model |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `tolerance` | number, or broadcast to [b, t, d] | a difference of no more than this counts as none |

    Args:
        state: Current state.
        target: Base state.
        mask: Real tokens.
        tolerance: Rounding of the stored target and noise, to be ignored.

    Returns:
        Mean over the real elements of each row, shape [b], float32 (float64 for a float64 state).

    Relations:
        The square of L1 element by element. For small drifts TM with `"elements"` grows like it, by frequency times
        size, but is 0 for elements that stay in their region.

    Example:
        >>> l2_distance(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2), torch.ones(1, 1))
        tensor([5.])
    """
    return _mean_over_elements(_difference(state, target, mask, tolerance).square(), mask)


def _difference(state: Tensor, target: Tensor, mask: Tensor, tolerance: Tensor | float) -> Tensor:
    current = wide(state)
    difference = current - target.to(current)
    far = mask.bool().unsqueeze(-1) & ~(difference.abs() <= tolerance)  # a NaN is far
    # A product with the mask would be NaN where the padding is.
    return torch.where(far, difference, 0.0)


def _mean_over_elements(values: Tensor, mask: Tensor) -> Tensor:
    return values.sum(dim=(1, 2)) / (mask.bool().sum(dim=1) * values.shape[-1]).clamp(min=1)


class _Imitation(Strategy):
    """Base of the strategies that keep the last-layer state near that of the base model."""

    measures = True
    kind = "states"
    field = "states of the last layer"
    shard_bytes = 2.0
    wants_parts = True
    compare: ClassVar[Callable[..., Tensor]]

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self.layers = (self.depth,)

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """Return the state unchanged."""
        return {"state": states[0]}

    def encode(self, kept: Tensors, constants: Tensors) -> Tensors:
        """Return the state in bfloat16."""
        return {"state": kept["state"].to(STORED)}

    def distance(self, seen: Seen, targets: Tensors, constants: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the difference of each row; elements are not counted."""
        target = targets["state"].float()
        tolerance: Tensor | float = LEAST_DIFFERENCE
        # A stored target is rounded, and a model in 16 bits rounds the state of today in another way than that of
        # the anchor. Neither is drift.
        if self.half or not self.live:
            tolerance = BF16_ROUNDING * target.abs() + LEAST_DIFFERENCE
        # `self.compare` would be a method to a type checker, which hands over `self`.
        difference = type(self).compare(seen.states[0], target, seen.mask, tolerance)
        nothing = torch.zeros_like(difference)
        return difference, nothing, nothing


class AbsoluteImitation(_Imitation):
    """Strategy `"l1"`: mean absolute difference."""

    name = "l1"
    order = 1
    compare = staticmethod(l1_distance)


class SquaredImitation(_Imitation):
    """Strategy `"l2"`: mean squared difference."""

    name = "l2"
    order = 2
    compare = staticmethod(l2_distance)
