"""Sums on the device between two logs: nothing is read back per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

NAMES = (
    "task_loss",
    "steps",
    "rows",
    "ce",
    "gain",
    "distance",
    "weight",
    "active",
    "violated",
    "elements",
    "unrelated",
    "known",
    "capped",
    "cappable",
)


class Meters:
    """Adds up what the log shows, over micro-batches; ranks are joined when it is read.

    Args:
        distance: What the distance is called in the log; empty if there is none.
    """

    def __init__(self, distance: str = "tm") -> None:
        self._distance = distance
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def step(self) -> None:
        """Count an optimizer step that has task rows."""
        self._steps += 1

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add scalars, wherever they are."""
        for name, value in sums.items():
            known = self._sums.get(name)
            wide = value.detach().to(torch.float32)
            self._sums[name] = wide if known is None else known + wide

    def read(self, join: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Averages since the last reading, and start again.

        Args:
            join: Adds a vector up over the ranks and returns the mean over them.
            device: Where the vector is put together.

        Returns:
            `gere/...` values by name; empty if no replay step was taken.
        """
        steps = torch.tensor(float(self._steps), device=device)
        present = {**self._sums, "steps": steps}
        zero = torch.zeros((), device=device)
        vector = torch.stack([present.get(name, zero).to(device) for name in NAMES])
        total = dict(zip(NAMES, join(vector).tolist(), strict=True))
        self._sums, self._steps = {}, 0
        return _averages(total, self._distance)


def _averages(total: Mapping[str, float], distance: str) -> dict[str, float]:
    logs = {}
    if total["steps"]:
        logs["gere/task_loss"] = total["task_loss"] / total["steps"]
    if total["rows"]:
        logs["gere/ce"] = total["ce"] / total["rows"]
        logs["gere/forgetting"] = total["gain"] / total["rows"]
        if distance:
            logs[f"gere/{distance}"] = total["distance"] / total["rows"]
            logs["gere/weight"] = total["weight"] / total["active"] if total["active"] else 0.0
    if total["cappable"]:
        logs["gere/capped"] = total["capped"] / total["cappable"]
    if total["known"]:
        logs["gere/unrelated"] = total["unrelated"] / total["known"]
    if total["elements"]:
        logs["gere/violations"] = total["violated"] / total["elements"]
    return logs
