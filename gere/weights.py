"""Weight of the distance of each replay row: fixed, dynamic, or in units of the model's own.

A distance has a scale of its own in every model and for every strategy, so a number that is right for one is wrong for
another. What all share is the distance of a row to text that it has nothing to do with. `auto` measures that, and
weighs the distance so that, a tenth of the way there, all strategies pull alike: by 20 nats for the whole way. Its cap
is in units of the row's own cross-entropy, so that a model that drifts far anyway can still learn its task.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gere.errors import UnsupportedSettingError

logger = logging.getLogger("gere")
PULL, DRIFT = 20.0, 0.1  # chosen by the curves of docs/strategies.md, full training and LoRA together
CAP = 3.0  # likewise
CALIBRATION_ROWS = 64


def auto_nats(order: int) -> float:
    """What the distance to unrelated text costs, in nats of cross-entropy.

    Args:
        order: 1 for a distance that grows with the drift, 2 for one that grows with its square.

    Returns:
        20 for order 1, 100 for order 2: c such that c r^order has the slope 20 at r = 0.1.
    """
    return PULL / (order * DRIFT ** (order - 1))


class RowWeight:
    """Weight of each row; carries no gradient and needs no device sync.

    Attributes:
        calibrating: Whether it wants to know the distance of the next rows to unrelated text.
    """

    calibrating = False

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """Weights, shape [b], from cross-entropy and distance of each row, shape [b]."""
        raise NotImplementedError

    def capped(self, weight: Tensor) -> Tensor | None:
        """Which of the weights that were given are at the cap, shape [b]; `None` where there is no cap."""
        return None

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        """Take note of a micro-batch: `unrelated`, the sum over its `rows`."""

    def end_step(self, rows: int, join: Callable[[Tensor], Tensor]) -> None:
        """Take note of the end of an optimizer step, on all ranks.

        Args:
            rows: Replay rows of the step, over all ranks.
            join: Mean of a vector over the ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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
        return _dynamic(ce, distance)


def _dynamic(ce: Tensor, distance: Tensor) -> Tensor:
    """Weight by which a distance counts as much as the cross-entropy of its row."""
    return ce.detach() / (distance.detach() + 1e-8)


class AutoWeight(RowWeight):
    """`auto_nats` / distance to unrelated text, the mean over the first 64 replay rows of the run, up to a cap.

    A row whose distance would count more than `CAP` times its cross-entropy gets the weight at which it counts just
    that, as by `dy`. The rows of an optimizer step get the weight that follows from the steps before it, so that it
    does not depend on how the rows are split. In the first step, where an untouched model has distance 0, it is 0.

    Args:
        order: Order of the distance, as for `auto_nats`.
        name: The distance, by which a checkpoint knows what it measured.
    """

    def __init__(self, order: int, name: str) -> None:
        self._nats = auto_nats(order)
        self._name = name
        self._open: Tensor | None = None
        self._known: Tensor | None = None
        self._rows = 0

    @property
    def calibrating(self) -> bool:  # type: ignore[override]
        """Whether fewer rows than needed are known."""
        return self._rows < CALIBRATION_ROWS

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """The quotient, at most the cap; 0 while nothing is known."""
        level = self._level(distance)
        return torch.minimum(level, CAP * _dynamic(ce, distance).to(level))

    def capped(self, weight: Tensor) -> Tensor:
        """Those below the quotient."""
        return weight < self._level(weight)

    def _level(self, like: Tensor) -> Tensor:
        if self._known is None:
            return torch.zeros_like(like.detach())
        self._known = self._known.to(like.device)
        total, rows = self._known
        return torch.where(total > 0, self._nats * rows / total, 0.0).to(like.dtype).expand_as(like)

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
        mean = join(own)
        joined = mean * (rows / mean[1])  # the sum over the ranks, whatever their number was before a resume
        self._known = joined if self._known is None else self._known.to(joined) + joined
        self._open = None
        self._rows += rows
        if not self.calibrating:
            self._require_measurable(float(self._known[0]))  # the one value that is read back

    def _require_measurable(self, total: float) -> None:
        if not (math.isfinite(total) and total > 0):
            raise UnsupportedSettingError(
                "The distance of the replay rows to unrelated text is no positive number, so that nothing is held.",
                where=f"w_strategy='auto' with {self._name}",
                expected="a distance above 0 over the first replay rows",
                found=total,
                fix="With tm, set gere_config.band_width smaller, or the quantiles further apart from 0 and 1.",
            )

    def state_dict(self) -> dict[str, Any]:
        """The distance, the sum over rows that are known, their number, and the rows of all ranks."""
        if self._known is None or not self._known[0] > 0:
            return {}
        total, number = self._known.tolist()
        return {"distance": self._name, "unrelated": total, "number": number, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint knows, unless it measured another distance."""
        if state and state["distance"] != self._name:
            logger.warning("The checkpoint weighed %s; the weight of %s is found anew.", state["distance"], self._name)
        elif state:
            self._known = torch.tensor([state["unrelated"], state["number"]])
            self._rows = int(state["rows"])


class Weighable(Protocol):
    """What a weight has to know of a distance.

    Attributes:
        name: Its name.
        order: 1 if it grows with the drift, 2 if it grows with its square.
    """

    name: str
    order: int


def make_weight(w_strategy: float | Literal["dy", "auto"], distance: Weighable | None) -> RowWeight:
    """The weight that `w_strategy` names; where there is no distance, none is asked for."""
    if distance is None:
        return FixedWeight(0.0)
    if w_strategy == "auto":
        return AutoWeight(distance.order, distance.name)
    return DynamicWeight() if w_strategy == "dy" else FixedWeight(w_strategy)
