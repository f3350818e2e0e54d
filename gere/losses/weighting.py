"""Weight of the distance of each replay row: fixed, dynamic, or calibrated on the model itself.

Each model and each strategy has its own scale of distance, so a weight that is right for one is wrong for another.
What all share is the distance of a row to text that it has nothing to do with. `auto` measures that distance and sets
the weight so that every strategy pulls equally hard, with a slope of 20 nats for the whole way, when a model has gone
a tenth of the way. A cap in units of the row's own cross-entropy lets a model that drifts far anyway learn its task.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gere.errors import CacheCorruptError, UnsupportedSettingError, brief
from gere.losses.strategy import Strategy

logger = logging.getLogger("gere")
PULL, DRIFT = 20.0, 0.1  # chosen by the curves of docs/strategies.md, full training and LoRA together
CAP = 3.0  # chosen by the same curves
CALIBRATION_ROWS = 64


def auto_nats(order: int) -> float:
    """What the distance to unrelated text costs, in nats of cross-entropy.

    Args:
        order: 1 for a distance that grows with the drift, 2 for one that grows with its square.

    Returns:
        20 for order 1, 100 for order 2: the c for which c r^order has the slope 20 at r = 0.1.
    """
    return PULL / (order * DRIFT ** (order - 1))


class RowWeight:
    """Weight of each row. It carries no gradient and never waits for the device.

    Attributes:
        calibrating: Whether it needs the distance of the next rows to unrelated text.
        has_cap: Whether a weight can be at a cap.
    """

    calibrating = False
    has_cap = False

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """Weights, [b], from cross-entropy and distance of each row, [b]."""
        raise NotImplementedError

    @property
    def level(self) -> float | None:
        """The weight before a cap; `None` where each row has its own. Reads the device."""
        return None

    def capped(self, weight: Tensor) -> Tensor:
        """1 for each of these weights that is at the cap, [b]."""
        return torch.zeros_like(weight)

    def observe(self, unrelated: Tensor, rows: Tensor) -> None:
        """Take note of a micro-batch: the sum of its distances to unrelated text, and the number of its rows."""

    def end_step(self, rows: int, join: Callable[[Tensor], Tensor]) -> None:
        """Take note of the end of an optimizer step, on all ranks.

        Args:
            rows: Replay rows of the step, over all ranks.
            join: Mean of a vector over the ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same weights; empty if nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], where: object = None) -> None:
        """Continue from the state of a checkpoint.

        Args:
            state: What `state_dict` gave.
            where: The file that it comes from, for messages.

        Raises:
            CacheCorruptError: If it cannot be used.
        """


class FixedWeight(RowWeight):
    """The same number for each row.

    Args:
        weight: The number.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight

    @property
    def level(self) -> float:
        """The number."""
        return self._weight

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """The number."""
        return torch.full_like(distance.detach(), self._weight)


class DynamicWeight(RowWeight):
    """CE / (distance + 1e-8), the official `dy`: a row with a distance counts twice its cross-entropy."""

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """The quotient."""
        return _dynamic(ce, distance)


def _dynamic(ce: Tensor, distance: Tensor) -> Tensor:
    """Weight with which a distance counts as much as the cross-entropy of its row."""
    return ce.detach() / (distance.detach() + 1e-8)


class AutoWeight(RowWeight):
    """`auto_nats` / distance to unrelated text, the mean over the first 64 replay rows of the run, up to a cap.

    A row whose distance would count more than `CAP` times its cross-entropy gets the weight with which it counts just
    that. All rows of an optimizer step get the weight that follows from the steps before it, so that the weight does
    not depend on how the rows are split. In the first step it is 0; an untouched model has no distance then anyway.

    Args:
        strategy: The strategy, whose order sets the scale and whose name tells checkpoints apart.
    """

    has_cap = True

    def __init__(self, strategy: Strategy) -> None:
        self._nats = auto_nats(strategy.order)
        self._name = strategy.name
        # Sum of the distances to unrelated text and number of rows: of this step and rank, and of all steps before.
        self._open = torch.zeros(2)
        self._known = torch.zeros(2)
        self._rows = 0

    @property
    def calibrating(self) -> bool:  # type: ignore[override]
        """Whether fewer rows than needed are known."""
        return self._rows < CALIBRATION_ROWS

    @property
    def level(self) -> float:
        """The quotient; 0 while nothing is known."""
        return float(self._level(self._known[0]))

    def __call__(self, ce: Tensor, distance: Tensor) -> Tensor:
        """The quotient, at most the cap; 0 while nothing is known."""
        level = self._level(distance)
        return torch.minimum(level, CAP * _dynamic(ce, distance).to(level))

    def capped(self, weight: Tensor) -> Tensor:
        """1 for each weight below the quotient."""
        return (weight < self._level(weight)).to(weight)

    def _level(self, like: Tensor) -> Tensor:
        self._known = self._known.to(like.device)  # moved once; the value is not read back
        total, rows = self._known
        return torch.where(total == 0, 0.0, self._nats * rows / total).to(like.dtype).expand_as(like)

    def observe(self, unrelated: Tensor, rows: Tensor) -> None:
        """Add a micro-batch."""
        if self.calibrating:
            self._open = self._open.to(rows.device) + torch.stack([unrelated, rows])

    def end_step(self, rows: int, join: Callable[[Tensor], Tensor]) -> None:
        """Make the rows of the step known to all ranks."""
        if not (self.calibrating and rows):
            return
        mean = join(self._open)
        # The sum over the ranks; their number may be another one after a resume.
        self._known = self._known.to(mean.device) + mean * (rows / mean[1])
        self._open = torch.zeros(2)
        self._rows += rows
        if not self.calibrating:
            self._require_measurable(float(self._known[0]))  # the one value that is read back, once a run

    def _require_measurable(self, total: float) -> None:
        if not (math.isfinite(total) and total > 0):
            raise UnsupportedSettingError(
                "w_strategy='auto' could not calibrate: the distance to unrelated text is no positive number, so the "
                "anchor would have no effect.",
                where=f"w_strategy='auto' with {self._name}",
                expected="a distance above 0 over the first replay rows",
                found=total,
                fix="With tm, set gere_config.band_width smaller, or the quantiles farther from 0 and 1.",
            )

    def state_dict(self) -> dict[str, Any]:
        """The distance, the sum over the rows that are known, their number, and the rows of all ranks."""
        total, number = self._known.tolist()
        if not total > 0:
            return {}
        return {"distance": self._name, "unrelated": total, "number": number, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any], where: object = None) -> None:
        """Continue from what a checkpoint knows, unless it measured another distance."""
        if not state:
            return
        try:
            measured, numbers = state["distance"], [state[name] for name in ("unrelated", "number", "rows")]
            known = torch.tensor(numbers[:2], dtype=torch.float32)
            # `type` and not `isinstance`, since True is an int, too.
            sound = type(measured) is str and {*map(type, numbers)} <= {int, float}
            if not (sound and known.isfinite().all() and all(0 < value < 2**63 for value in numbers)):
                raise ValueError(brief(dict(state)))
        # Of values that are no numbers, or of integers that no tensor holds.
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CacheCorruptError(
                "The state of the replay weight in the checkpoint cannot be used.",
                where=where,
                expected="a distance, and positive numbers for unrelated, number and rows",
                found=f"{type(error).__name__}: {error}",
                fix="Restore the file; or delete it, and the weight calibrates again on the next replay rows.",
            ) from error
        if measured != self._name:
            logger.warning(
                "The checkpoint weighed %s; the weight of %s calibrates again.", brief(measured), self._name
            )
            return
        self._known = known
        self._rows = int(numbers[2])


def make_weight(w_strategy: float | Literal["dy", "auto"], strategy: Strategy) -> RowWeight:
    """The weight that `w_strategy` names; 0 for a strategy without a distance."""
    if not strategy.measures:
        return FixedWeight(0.0)
    if w_strategy == "auto":
        return AutoWeight(strategy)
    if w_strategy == "dy":
        return DynamicWeight()
    return FixedWeight(w_strategy)
