"""Weight of the distance of each replay row: fixed, dynamic, or in units of the model's own.

A distance has a scale of its own in every model and for every strategy, so a number that is right for one is wrong
for another. What all share is the distance of a row to text that it has nothing to do with. `auto` measures that, and
lets the distance cost as much there as 100 nats of cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

AUTO_NATS = 100.0  # chosen by docs/strategies.md: best, or within the noise, in full training and in LoRA
CALIBRATION_ROWS = 64


class RowWeight:
    """Weight of each row; carries no gradient and needs no device sync.

    Attributes:
        calibrating: Whether it wants to know the distance of the next rows to unrelated text.
    """

    calibrating = False

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """Weights, shape [b], from cross-entropy and distance of each row, shape [b]."""
        raise NotImplementedError

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        """Take note of a micro-batch: `unrelated`, the sum over its `rows`."""

    def end_step(self, rows: int, join: Callable[[Tensor], Tensor]) -> None:
        """Take note of the end of an optimizer step, on all ranks.

        Args:
            rows: Replay rows of the step, over all ranks.
            join: Mean of a vector over the ranks.
        """

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs to go on with the same weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from the state of a checkpoint."""


class FixedWeight(RowWeight):
    """The same number for each row.

    Args:
        weight: The number.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """The number."""
        return torch.full_like(distance.detach(), self._weight)


class DynamicWeight(RowWeight):
    """CE / (distance + 1e-8), the official `dy`: a row with a distance counts twice its cross-entropy."""

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """The quotient."""
        return ce.detach() / (distance.detach() + 1e-8)


class AutoWeight(RowWeight):
    """100 nats / distance to unrelated text, the mean over the first 64 replay rows of the run.

    The rows of an optimizer step get the weight that follows from the steps before it, so that it does not depend on
    how the rows are split. In the first step, where the distance of an untouched model is 0, it is 0.
    """

    def __init__(self) -> None:
        self._open: Tensor | None = None
        self._known: Tensor | None = None
        self._rows = 0

    @property
    def calibrating(self) -> bool:  # type: ignore[override]
        """Whether fewer rows than needed are known."""
        return self._rows < CALIBRATION_ROWS

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """The quotient; 0 while nothing is known."""
        if self._known is None:
            return torch.zeros_like(distance.detach())
        total, rows = self._known.to(distance.device)
        return (AUTO_NATS * rows / total).to(distance.dtype).expand_as(distance)

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        """Add the sum over the rows of a micro-batch."""
        if self.calibrating:
            pair = torch.stack([sums["unrelated"], sums["rows"]]).float()
            self._open = pair if self._open is None else self._open + pair

    def end_step(self, rows: int, join: Callable[[Tensor], Tensor]) -> None:
        """Make the rows of the step known to all ranks."""
        if not (self.calibrating and rows):
            return
        own = self._open if self._open is not None else torch.zeros(2)
        joined = join(own)
        self._known = joined if self._known is None else self._known.to(joined) + joined
        self._open = None
        self._rows += rows

    def state_dict(self) -> dict[str, float]:
        """Sum of the distances, their number, and the rows of all ranks."""
        if self._known is None:
            return {}
        total, number = self._known.tolist()
        return {"unrelated": total, "number": number, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what a checkpoint knows."""
        if state:
            self._known = torch.tensor([state["unrelated"], state["number"]])
            self._rows = int(state["rows"])


def make_weight(w_strategy: float | Literal["dy", "auto"]) -> RowWeight:
    """The weight that `w_strategy` names."""
    if w_strategy == "auto":
        return AutoWeight()
    return DynamicWeight() if w_strategy == "dy" else FixedWeight(w_strategy)
