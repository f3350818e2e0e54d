"""The replay loss of a batch: CE_i + w_i D_i, and what is logged of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gere.losses.cross_entropy import next_token_ce
from gere.losses.strategy import Seen, Strategy, Tensors
from gere.losses.weighting import RowWeight


class ReplaySums(NamedTuple):
    """Detached sums over the replay rows of a batch, each a tensor without dimensions.

    Attributes:
        rows: Number of rows.
        ce: Cross-entropy.
        change: Cross-entropy minus that of the base model.
        distance: D_i.
        weight: w_i of the rows with a distance above 0.
        active: Rows with a distance above 0.
        violated: Elements outside their region.
        elements: Elements that have a region.
        unrelated: Distance to unrelated text, while the weight calibrates.
        calibrated: Rows that went into `unrelated`.
        capped: Rows whose weight is at its cap.
        cappable: Rows whose weight could be at its cap.
    """

    rows: Tensor
    ce: Tensor
    change: Tensor
    distance: Tensor
    weight: Tensor
    active: Tensor
    violated: Tensor
    elements: Tensor
    unrelated: Tensor
    calibrated: Tensor
    capped: Tensor
    cappable: Tensor


class ReplayObjective:
    """CE_i + w_i D_i, summed over the replay rows of a batch.

    Args:
        strategy: Gives D_i.
        constants: What the anchor holds for all tokens, on the device of the model.
        weight: Gives w_i.
    """

    def __init__(self, strategy: Strategy, constants: Tensors, weight: RowWeight) -> None:
        self._strategy = strategy
        self._constants = constants
        self._weight = weight

    def __call__(self, seen: Seen, base_ce: Tensor, targets: Tensors) -> tuple[Tensor, ReplaySums]:
        """Loss of replay rows.

        Args:
            seen: What the model gives for them.
            base_ce: Cross-entropy of the base model on each row, [b].
            targets: What the strategy holds the rows to, [b, t, *].

        Returns:
            The sum over the rows with its graph, and sums for the log.
        """
        ce = next_token_ce(seen.logits, seen.ids, seen.mask)
        distance, violated, elements = self._strategy.distance(seen, targets, self._constants)
        weight = self._weight(ce, distance)
        active = (~(distance.detach() <= 0)).to(ce)  # a row whose distance is NaN, too
        nothing = torch.zeros_like(active)
        unrelated = calibrated = nothing
        # Only now: once the weight is calibrated, the second distance would be computed for nobody.
        if self._weight.calibrating:
            unrelated = self._unrelated(seen, targets)
            calibrated = torch.ones_like(active)
        by_row = ReplaySums(
            rows=torch.ones_like(active),
            ce=ce,
            change=ce - base_ce,
            distance=distance,
            weight=weight * active,
            active=active,
            violated=violated,
            elements=elements,
            unrelated=unrelated,
            calibrated=calibrated,
            capped=self._weight.capped(weight) * active,
            cappable=active * float(self._weight.has_cap),
        )
        sums = ReplaySums(*(values.detach().sum().float() for values in by_row))
        if not self._strategy.measures:
            return ce.sum(), sums
        return (ce + weight * distance).sum(), sums

    @torch.no_grad()
    def _unrelated(self, seen: Seen, targets: Tensors) -> Tensor:
        """Distance of each row to itself, moved by half of its length: to text that it has nothing to do with."""
        lengths = seen.mask.sum(dim=1, keepdim=True)
        place = torch.arange(seen.mask.shape[1], device=seen.mask.device)[None]
        other = torch.where(place < lengths, (place + lengths // 2) % lengths.clamp(min=1), place)
        row = torch.arange(len(other), device=other.device)[:, None]
        moved = {name: values[row, other] for name, values in targets.items()}
        return self._strategy.distance(seen, moved, self._constants)[0]
