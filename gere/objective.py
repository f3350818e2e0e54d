"""The replay loss of a batch: losses, weights, the share of the step, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gere.collator import TARGET
from gere.distances import Distance, Seen
from gere.losses import next_token_ce
from gere.weights import RowWeight

LiveTargets = Callable[[Tensor, Tensor], dict[str, Tensor]]


class ReplayObjective:
    """CE_i + w_i D_i, summed over the replay rows of a batch.

    Args:
        weight: w_i.
        distance: D_i; `None` for label fitting alone.
        live: Gives the targets of token ids and their mask where they are not stored.
    """

    def __init__(self, weight: RowWeight, distance: Distance | None, live: LiveTargets | None = None) -> None:
        self.weight = weight
        self._distance = distance
        self._live = live

    def __call__(self, seen: Seen, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of replay rows.

        Args:
            seen: What the model gave for them.
            batch: Replay part of a mixed batch.

        Returns:
            The sum over the rows, and detached sums for the log by name.
        """
        ce = next_token_ce(seen.logits, batch["input_ids"], seen.mask)
        sums = {"rows": torch.ones_like(ce.detach()), "ce": ce.detach(), "gain": ce.detach() - batch["base_ce"]}
        if self._distance is None:
            return ce.sum(), _totals(sums)
        targets = self._targets(batch)
        distance, counts = self._distance(seen, targets)
        if self.weight.calibrating:
            sums |= {"unrelated": self._unrelated(self._distance, seen, targets), "known": sums["rows"]}
        weight = self.weight(ce, distance)
        active = (distance.detach() > 0).to(ce)
        sums |= {"distance": distance.detach(), "weight": weight * active, "active": active, **counts}
        capped = self.weight.capped(weight)
        if capped is not None:
            sums |= {"capped": capped * active, "cappable": active}
        return (ce + weight * distance).sum(), _totals(sums)

    @torch.no_grad()
    def _unrelated(self, distance: Distance, seen: Seen, targets: Mapping[str, Tensor]) -> Tensor:
        """Distance of each row to itself half a row further on: to text that it has nothing to do with."""
        lengths = seen.mask.sum(dim=1, keepdim=True)
        place = torch.arange(seen.mask.shape[1], device=seen.mask.device)[None]
        other = torch.where(place < lengths, (place + lengths // 2) % lengths.clamp(min=1), place)
        row = torch.arange(len(other), device=other.device)[:, None]
        return distance(seen, {name: values[row, other] for name, values in targets.items()})[0]

    def _targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._live is not None:
            return self._live(batch["input_ids"], batch["attention_mask"])
        return {name.removeprefix(TARGET): values for name, values in batch.items() if name.startswith(TARGET)}


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
