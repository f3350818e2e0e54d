"""The replay loss of a batch: forward pass, losses, weights, the share of the step, and what is logged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gere import _compat
from gere.cache import Anchor, Bands, unpack
from gere.losses import Normalization, margin_sums, next_token_ce, normalize_margin, row_weight
from gere.states import StateReader

# Rounding in 16 bits moves single elements over their bands by more than the tolerance that was measured. A row with
# so few violations has not drifted: training violates hundreds of times as many.
NOISE_SHARE_16_BITS = 1e-4


class ReplayObjective:
    """CE_i + w_i D_i, summed over the replay rows of a batch.

    Args:
        w_strategy: Weight of the distance, a number or `"dy"`.
        normalization: What the margin of a row is divided by.
        anchor: Bands of the base model; without regions the distance is 0.
    """

    def __init__(self, w_strategy: float | Literal["dy"], normalization: Normalization, anchor: Anchor) -> None:
        self.w_strategy = w_strategy
        self.normalization = normalization
        self._bands = anchor.bands if anchor.dim else None
        self._noise_share = NOISE_SHARE_16_BITS if re.search(r"(bf|fp|float)16", anchor.fields["dtype"]) else 0.0

    def __call__(
        self, model: nn.Module, reader: StateReader, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model on replay rows.

        Args:
            model: The wrapped model, as the trainer calls it.
            reader: Reads the state of the model inside.
            batch: Replay part of a mixed batch.

        Returns:
            The sum over the rows, and detached sums for the log by name.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with _compat.uncompiled(), reader.reading():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            ce = next_token_ce(logits, ids, mask)
            sums = {"rows": torch.ones_like(ce.detach()), "ce": ce.detach(), "gain": ce.detach() - batch["base_ce"]}
            if self._bands is None:
                return ce.sum(), _totals(sums)
            state = reader.state
            if self._bands.lower.device != state.device:
                self._bands = Bands(*(band.to(state.device) for band in self._bands))
            lower, upper, tolerance = self._bands
            region = unpack(batch["packed_regions"], state.shape[-1])
            margin = margin_sums(state, region, lower, upper, mask, tolerance)
        drifted = margin.violated > self._noise_share * margin.elements
        distance = torch.where(drifted, normalize_margin(margin, self.normalization), 0.0)
        weight = row_weight(self.w_strategy, ce, distance)
        active = (distance.detach() > 0).to(ce)
        sums |= {"tm": distance.detach(), "weight": weight * active, "active": active}
        sums |= {"violated": margin.violated, "elements": margin.elements}
        return (ce + weight * distance).sum(), _totals(sums)


class StepShare(NamedTuple):
    """How the parts of one optimizer step add up to L = T/B L_task + 1/B sum_i (CE_i + w_i D_i).

    Attributes:
        task_rows: T, over all ranks and accumulation steps.
        replay_rows: R, likewise.
        ranks: Number of ranks, over which gradients are averaged.
        divisor: What the trainer divides each loss by: the accumulation steps, or `None` if it does not divide,
            since the parent's losses of the step already add up to L_task.
        own_share: Task rows of this rank over the mean of all ranks, where the losses of each rank add up to a mean
            over its own rows; 1 where they add up over all ranks.
    """

    task_rows: int
    replay_rows: int
    ranks: int
    divisor: int | None
    own_share: float = 1.0

    @property
    def _rows(self) -> int:
        return self.task_rows + self.replay_rows

    def task_factor(self, rows_here: int) -> float:
        """Factor of the parent's loss of a micro-batch; the parent's means count by their rows, a spare row by 0."""
        if self.divisor is None:
            return self.task_rows * self.own_share / self._rows if rows_here else 0.0
        return rows_here * self.ranks * self.divisor / self._rows

    @property
    def replay_factor(self) -> float:
        """Factor of the sum over the replay rows of a micro-batch."""
        return self.ranks * (self.divisor or 1) / self._rows

    def logged_factor(self, rows_here: int) -> float:
        """What a parent's loss adds to the logged L_task, the mean over ranks taken later."""
        if self.divisor is None:
            return self.own_share if rows_here else 0.0
        return rows_here * self.ranks / self.task_rows


def _totals(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.sum() for name, values in sums.items()}
