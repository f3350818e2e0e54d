"""Sums on the device between two logs: nothing is read back in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gere.losses.objective import ReplaySums


class Meters:
    """Adds up what the log shows, over micro-batches; ranks are joined when it is read.

    Args:
        distance: Name of the distance in the log; empty if there is none.
        device: Where the sums are.
        resumed: Whether the first step of the training was taken before.
    """

    def __init__(self, distance: str, device: torch.device, *, resumed: bool = False) -> None:
        self._distance = distance
        self._device = device
        self._first = torch.zeros(2, device=device)
        self._read_before = resumed
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        # Sum of the losses of the steps, and how many of them have a label.
        self._task = torch.zeros(2, device=self._device)
        self._replay = torch.zeros(len(ReplaySums._fields), device=self._device)

    def step(self, labels: Tensor | int | None) -> None:
        """Count an optimizer step that has task rows; it begins.

        Args:
            labels: Labels that the parent divides the loss by; `None` if it does not count them.
        """
        if self._steps == 1 and not self._read_before:
            self._first = self._task
        self._steps += 1
        # The loss of a step without a label is 0. It is none of a model that has learned everything.
        counts = torch.as_tensor(1 if labels is None else labels, device=self._device).gt(0).any().float()
        self._task = self._task + torch.stack([torch.zeros_like(counts), counts])

    def add_task(self, loss: Tensor) -> None:
        """Add the parent's loss of a micro-batch, weighed by its share of the step."""
        value = loss.detach().float().to(self._device)
        self._task = self._task + torch.stack([value, torch.zeros_like(value)])

    def add_replay(self, sums: ReplaySums) -> None:
        """Add the replay rows of a micro-batch."""
        self._replay = self._replay + torch.stack(list(sums)).to(self._device)

    def read(self, join: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Averages since the last reading, and start again.

        Args:
            join: Mean of a vector over the ranks.

        Returns:
            `gere/...` values by name; empty if no step was taken. Without a label there is no task loss.
        """
        first = self._task if self._steps == 1 else self._first
        first_loss, first_count, *sums = join(torch.cat([first, self._task, self._replay])).tolist()
        logs = self._averages(*sums)
        if logs and first_count and not self._read_before:
            logs["gere/first_task_loss"] = first_loss / first_count
        self._read_before = self._read_before or bool(logs)
        self._clear()
        return logs

    def _averages(self, task_loss: float, labelled: float, *replay: float) -> dict[str, float]:
        logs = {}
        if labelled:
            logs["gere/task_loss"] = task_loss / labelled
        sums: Any = ReplaySums._make(replay)  # type: ignore[arg-type] # floats here, by the same names
        if sums.rows:
            logs["gere/ce"] = sums.ce / sums.rows
            logs["gere/replay_change"] = sums.change / sums.rows
            logs["gere/forgetting"] = logs["gere/replay_change"]  # its name until 0.2, for one release
            if self._distance:
                logs[f"gere/{self._distance}"] = sums.distance / sums.rows
                logs["gere/weight"] = sums.weight / sums.active if sums.active else 0.0
        if sums.cappable:
            logs["gere/capped"] = sums.capped / sums.cappable
        if sums.calibrated:
            logs["gere/unrelated"] = sums.unrelated / sums.calibrated
        if sums.elements:
            logs["gere/violations"] = sums.violated / sums.elements
        return logs
