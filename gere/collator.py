"""Batches of task rows and replay rows: the user's collator for the one, padding and stored targets for the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gere.cache import Anchor
from gere.cache.plan import shortest_row
from gere.sampler import Slot

TASK, REPLAY, ROWS = "gere_task", "gere_replay", "gere_rows"
TOKENS = ("input_ids", "attention_mask")
TARGET = "target_"  # before the name of each stored target in a replay batch
Collator = Callable[[list[Any]], dict[str, Any]]


class RowCounts(NamedTuple):
    """Rows of a micro-step; in a batch a plain tuple, since `Trainer` rebuilds tuples from one argument.

    Attributes:
        task: Task rows on this rank.
        replay: Replay rows on this rank.
        all_task: Task rows over all ranks.
        all_replay: Replay rows over all ranks.
    """

    task: int
    replay: int
    all_task: int
    all_replay: int


@dataclass(frozen=True)
class TaskRow:
    """A row of the user's dataset. No dict, so that no column of it is taken for an unused one."""

    content: Any
    everywhere: tuple[int, int] | None = None


@dataclass(frozen=True)
class ReplayRow:
    """A row of the replay set by its index.

    `everywhere`, here and in `TaskRow`, are the task rows and replay rows of its micro-step over all ranks; `None` if
    this rank holds them all.
    """

    index: int
    everywhere: tuple[int, int] | None = None


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

    def __getitem__(self, slot: int | Slot) -> TaskRow | ReplayRow:
        """Row at a flat index of the sampler."""
        index, everywhere = (slot.place, slot[1:]) if isinstance(slot, Slot) else (slot, None)
        if index >= self.num_task:
            return ReplayRow(index - self.num_task, everywhere)
        return TaskRow(self.task[index], everywhere)

    def spare(self) -> Any:
        """A task row for a rank that has none in a micro-step in which others do."""
        return self.task[0]


class MixedCollator:
    """Collate task rows by the user's collator and replay rows by padding, as one nested batch.

    The batch has no top-level `labels`: Trainer would gather counts of them on some ranks only. Top-level `input_ids`
    and `attention_mask` hold the task tokens in one dimension, for the trainer's token and FLOP counters. A part that
    other ranks have in this micro-step and this one has not is there all the same, made of one spare row, since ranks
    that call the model a different number of times wait for each other for ever; but see `spares_replay`.
    `gere_rows` counts real rows only.

    Args:
        task_collator: The user's collator.
        rows: Token ids of the replay rows.
        pad_id: Padding token of the replay rows.
        spare: Gives a task row for a rank that has none; needed with several ranks.

    Attributes:
        anchor: Stored targets, once known; without it replay rows carry tokens alone.
        spares_replay: Whether a rank without replay rows gets a spare one; not where no other waits for its call.
    """

    def __init__(
        self,
        task_collator: Collator,
        rows: Sequence[Sequence[int]],
        pad_id: int,
        spare: Callable[[], Any] | None = None,
    ) -> None:
        self.task_collator = task_collator
        self.rows = rows
        self.pad_id = pad_id
        self.spare = spare
        self.anchor: Anchor | None = None
        self.spares_replay = True
        self._spare_replay = [shortest_row(rows)] if rows else []

    def __call__(self, rows: Sequence[TaskRow | ReplayRow]) -> dict[str, Any]:
        """Collate the rows of one micro-batch."""
        tasks = [row.content for row in rows if isinstance(row, TaskRow)]
        replay = [row.index for row in rows if isinstance(row, ReplayRow)]
        here = len(tasks), len(replay)
        all_task, all_replay = rows[0].everywhere or here
        batch: dict[str, Any] = {}
        if all_task:
            batch[TASK] = dict(self.task_collator(copy.copy(tasks or self._spare_tasks())))
        self._add_replay(batch, replay, all_replay)
        batch[ROWS] = (*here, all_task, all_replay)  # numbers, not a tensor: reading one would wait for the device
        return batch | _flat_tokens(batch.get(TASK), here[0])

    def add(self, task: dict[str, Any], counts: RowCounts, indices: Sequence[int]) -> dict[str, Any]:
        """Add replay rows to a batch of task rows that the user's own loader made.

        Args:
            task: The batch.
            counts: Rows of the micro-step.
            indices: Replay rows for this rank.
        """
        batch: dict[str, Any] = {TASK: task, ROWS: tuple(counts)}
        self._add_replay(batch, indices, counts.all_replay)
        return batch | _flat_tokens(task, counts.task)

    def _add_replay(self, batch: dict[str, Any], rows: Sequence[int], everywhere: int) -> None:
        if rows or (everywhere and self.spares_replay):
            batch[REPLAY] = self.replay_batch(rows or self._spare_replay)

    def _spare_tasks(self) -> list[Any]:
        if self.spare is None:
            raise RuntimeError("a collator of several ranks needs a spare task row")
        return [self.spare()]

    def replay_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Pad replay rows on the right and add their stored targets.

        Returns:
            `input_ids` and `attention_mask`, int64 [b, t]; with an anchor `base_ce`, float32 [b], and the targets that
            it holds, [b, t, *], each with `target_` before its name.
        """
        batch = pad_rows([self.rows[index] for index in indices], self.pad_id)
        if self.anchor is not None:
            batch["base_ce"] = self.anchor.base_ce[list(indices)]
            targets = [self.anchor.targets(index) for index in indices]
            for name in targets[0]:
                batch[TARGET + name] = pad_sequence([target[name] for target in targets], batch_first=True)
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


def countable_tasks(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Task parts of the micro-batches of a step; a spare row learns nothing there, so that its tokens count 0."""
    return [_spared(sample[TASK], sample[ROWS][0]) for sample in samples if TASK in sample]


def _spared(task: dict[str, Any], rows: int) -> dict[str, Any]:
    if rows or not isinstance(task.get("labels"), Tensor):
        return task
    return {**task, "labels": torch.full_like(task["labels"], -100)}


def _flat_tokens(task: dict[str, Any] | None, rows: int) -> dict[str, Tensor]:
    """Tokens of the task rows in one dimension, none for a spare row or where there is no task row."""
    if task is None:
        return {name: torch.zeros(0, dtype=torch.int64) for name in TOKENS}
    found = {name: task[name].flatten() for name in TOKENS if isinstance(task.get(name), Tensor)}
    return found if rows else {name: tokens[:0] for name, tokens in found.items()}
