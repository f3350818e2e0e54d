"""Task rows and replay rows on their way through the data loader: side by side, never in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gere.sampler.insertion import Slot

Collator = Callable[[Any], Any]
NO_ROWS = ("input_ids", "attention_mask", "labels")


class RowCounts(NamedTuple):
    """Rows of a micro-step. Dummy rows do not count.

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


class MixedRows(NamedTuple):
    """The rows of a micro-step on this rank. It is no dict, so that no column of it is taken for an unused one.

    Attributes:
        task: What the user's dataset gave for its rows, a dummy row among them; `None` if no rank has a task row.
        replay: Indices of the replay rows.
        rows: Rows of the micro-step.
    """

    task: Any
    replay: list[int]
    rows: RowCounts


class MicroBatch(NamedTuple):
    """What the data loader sends for a micro-step.

    Attributes:
        task: What the user's collator made; `None` if no rank has a task row in this micro-step.
        replay: Indices of the replay rows of this rank.
        rows: Rows of the micro-step.
    """

    task: Any
    replay: list[int]
    rows: RowCounts


class MixedDataset(Dataset[MixedRows]):
    """The user's dataset followed by the replay set.

    Ranks that call the model a different number of times wait for each other forever. A rank without task rows in a
    micro-step in which others have some therefore gets a dummy task row, which `MixedRows.rows` does not count.

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

    def __getitem__(self, slot: Slot) -> MixedRows:
        """Row of a slot of the sampler."""
        return self.__getitems__([slot])[0]

    def __getitems__(self, slots: Sequence[Slot]) -> list[MixedRows]:
        """Rows of a micro-step, as one item: a dataset that reads several rows at once may give no list of them."""
        places = [slot.place for slot in slots if slot.place < self.num_task]
        replay = [slot.place - self.num_task for slot in slots if slot.place >= self.num_task]
        rows = RowCounts(len(places), len(replay), slots[0].task_rows, slots[0].replay_rows)
        if not rows.all_task:
            return [MixedRows(None, replay, rows)]
        return [MixedRows(self._tasks(places or [0]), replay, rows)]

    def _tasks(self, places: list[int]) -> Any:
        # As in torch's loader.
        read_all = getattr(self.task, "__getitems__", None)
        return read_all(places) if read_all else [self.task[place] for place in places]

    def set_epoch(self, epoch: int) -> None:
        """Tell the user's dataset which epoch begins, if it asks for that."""
        if hasattr(self.task, "set_epoch"):
            self.task.set_epoch(epoch)


class MixedCollator:
    """Collates task rows by the user's collator, and passes replay rows on by their indices.

    Args:
        task_collator: The user's collator.
    """

    def __init__(self, task_collator: Collator) -> None:
        self.task_collator = task_collator

    def __call__(self, sent: Sequence[MixedRows]) -> MicroBatch:
        """Collate the rows of one micro-step, which come as one item."""
        (mixed,) = sent
        if not mixed.rows.all_task:
            return MicroBatch(None, mixed.replay, mixed.rows)
        return MicroBatch(self.task_collator(mixed.task), mixed.replay, mixed.rows)

    def __getattr__(self, name: str) -> Any:
        """Forward what others ask of the user's collator, such as its tokenizer."""
        if name.startswith("__") or "task_collator" not in self.__dict__:
            raise AttributeError(name)  # pickling asks before the attributes are there
        return getattr(self.task_collator, name)


def unpacked(sent: Iterator[Any], parts: list[MicroBatch], device: torch.device) -> Iterator[Any]:
    """Give the user's own batches on, and keep the replay rows aside.

    Args:
        sent: What the data loader sends.
        parts: Gets what was unpacked, in order.
        device: Where batches are.

    Yields:
        For each micro-step the batch that the parent trains on: the one of the user's collator, or a batch without
        rows where there are replay rows alone. What no `MixedCollator` made comes as it is.
    """
    for batch in sent:
        if not isinstance(batch, MicroBatch):
            yield batch
            continue
        parts.append(batch)
        if batch.task is None:
            yield {name: torch.zeros(0, 0, dtype=torch.int64, device=device) for name in NO_ROWS}
        elif batch.rows.task:
            yield batch.task
        else:
            yield _unlearnable(batch.task)


def _unlearnable(task: Any) -> Any:
    """A dummy task row without labels, since the parent counts these as tokens to learn."""
    if not isinstance(task, Mapping) or not isinstance(task.get("labels"), Tensor):
        return task
    return {**task, "labels": torch.full_like(task["labels"], -100)}
