"""Batches of task rows and replay rows: the user's collator for the one, padding and stored targets for the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gere.cache import Anchor

TASK, REPLAY, ROWS = "gere_task", "gere_replay", "gere_rows"
Collator = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class TaskRow:
    """A row of the user's dataset. No dict, so that no column of it is taken for an unused one."""

    content: Any


@dataclass(frozen=True)
class ReplayRow:
    """A row of the replay set by its index."""

    index: int


class MixedDataset(Dataset[TaskRow | ReplayRow]):
    """The user's dataset followed by the replay set.

    Args:
        task: Map-style dataset of task rows.
        num_replay: Number of replay rows.

    Attributes:
        total_dataset_length: Rows that the sampler gives in an epoch; accelerate reads it to know the last batch.
    """

    def __init__(self, task: Any, num_replay: int) -> None:
        self.task = task
        self.num_task = len(task)
        self.num_replay = num_replay
        self.total_dataset_length = len(self)

    def __len__(self) -> int:
        """Task rows and replay rows together."""
        return self.num_task + self.num_replay

    def __getitem__(self, index: int) -> TaskRow | ReplayRow:
        """Row at a flat index of the sampler."""
        return ReplayRow(index - self.num_task) if index >= self.num_task else TaskRow(self.task[index])


class MixedCollator:
    """Collate task rows by the user's collator and replay rows by padding, as one nested batch.

    The batch has no top-level `labels`: Trainer would gather counts of them on some ranks only. Top-level `input_ids`
    and `attention_mask` hold the tokens of both parts in one dimension, for the trainer's token and FLOP counters.

    Args:
        task_collator: The user's collator.
        rows: Token ids of the replay rows.
        pad_id: Padding token of the replay rows.

    Attributes:
        anchor: Stored targets, once known; without it replay rows carry tokens alone.
    """

    def __init__(self, task_collator: Collator, rows: Sequence[Sequence[int]], pad_id: int) -> None:
        self.task_collator = task_collator
        self.rows = rows
        self.pad_id = pad_id
        self.anchor: Anchor | None = None

    def __call__(self, rows: Sequence[TaskRow | ReplayRow]) -> dict[str, Any]:
        """Collate the rows of one micro-batch."""
        tasks = [row.content for row in rows if isinstance(row, TaskRow)]
        replay = [row.index for row in rows if isinstance(row, ReplayRow)]
        batch: dict[str, Any] = {}
        if tasks:
            batch[TASK] = dict(self.task_collator(copy.copy(tasks)))
        if replay:
            batch[REPLAY] = self.replay_batch(replay)
        batch[ROWS] = (len(tasks), len(replay))  # numbers, not a tensor: reading one would wait for the device
        return batch | _flat_tokens([part for part in (batch.get(TASK), batch.get(REPLAY)) if part])

    def replay_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Pad replay rows on the right and add their stored targets.

        Returns:
            `input_ids` and `attention_mask`, int64 [b, t]; with an anchor `base_ce`, float32 [b], and where it holds
            regions `packed_regions`, uint8 [b, t, ceil(d / 4)].
        """
        batch = pad_rows([self.rows[index] for index in indices], self.pad_id)
        if self.anchor is not None:
            batch["base_ce"] = self.anchor.base_ce[list(indices)]
            if self.anchor.dim:
                codes = [self.anchor.packed_regions(index) for index in indices]
                batch["packed_regions"] = pad_sequence(codes, batch_first=True)
        return batch

    def __getattr__(self, name: str) -> Any:
        """Forward what others ask of the user's collator, such as its tokenizer."""
        if name.startswith("__") or "task_collator" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.task_collator, name)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad rows of token ids on the right.

    Returns:
        `input_ids` and `attention_mask`, int64 [b, t].
    """
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def _flat_tokens(parts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask")
    shared = [name for name in names if all(isinstance(part.get(name), Tensor) for part in parts)]
    return {name: torch.cat([part[name].flatten() for part in parts]) for name in shared}
