"""Which row comes next: a pure function of (seed, epoch, geometry)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler

from gere.errors import ConfigError
from gere.sampler.lengths import by_length, grouped, step_sizes

_TASK, _REPLAY, _MIXED, _PLACES = range(4)  # streams of random numbers that never meet
_WORD = 2**64 - 1


class Slot(NamedTuple):
    """A flat index, and the task and replay rows of its micro-step over all ranks.

    Every rank reads the same plan, so that all of them call the model equally often without asking each other.
    """

    place: int
    task_rows: int
    replay_rows: int


def parent_order(sampler: Any, seed: int, *, seedable: bool = True) -> Callable[[int], list[int]]:
    """Return the order of the task rows that a parent's sampler gives, as a function of the epoch.

    Args:
        sampler: A sampler with a length. A generator that it has, or could have, is seeded by (seed, epoch).
        seed: Seed of the order.
        seedable: Whether accelerate replaces each random sampler by its `SeedableRandomSampler`, as it does by
            default. Then the order is that one's.
    """

    def order(epoch: int) -> list[int]:
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
        if seedable and isinstance(sampler, RandomSampler):
            sampler.generator = torch.Generator().manual_seed(seed + epoch)
            # What a subclass does in `__iter__` is lost when accelerate replaces it.
            return list(RandomSampler.__iter__(sampler))
        # A sampler draws from the global generator otherwise, which a resumed run finds in another state.
        if hasattr(sampler, "generator"):
            word = _seeds(seed, _TASK, epoch).generate_state(1, np.uint64)[0]
            sampler.generator = torch.Generator().manual_seed(int(word) >> 1)
        return [int(index) for index in sampler]

    return order


def replay_stream(
    num_replay: int, seed: int, start: int, lengths: np.ndarray | None = None, rows_per_step: int = 1
) -> Iterator[int]:
    """Yield replay rows from a position of the endless sequence of whole permutations of the replay set.

    Args:
        num_replay: Replay rows in all.
        seed: Seed of the permutations.
        start: The position.
        lengths: Length of each row, int [num_replay], to give the rows of a step similar ones; `None` for any order.
        rows_per_step: Rows of a step; position 0 begins one.
    """
    first, skip = divmod(start, num_replay)
    for number in itertools.count(first):
        order = _permutation(num_replay, seed, _REPLAY, number)
        if lengths is not None:
            sizes = step_sizes(num_replay, number, rows_per_step)
            order = grouped(order, lengths, sizes, _permutation(len(sizes), seed, _PLACES, number))
        yield from order[skip:].tolist()
        skip = 0


def added_rows(
    num_replay: int,
    replay_per_batch: int,
    *,
    seed: int,
    start: int,
    micro_steps: int,
    micro_batch_size: int,
    world_size: int = 1,
    lengths: np.ndarray | None = None,
    rows_per_step: int | None = None,
) -> list[list[list[int]]]:
    """Choose replay rows that are added to the batches of one optimizer step, where they cannot replace task rows.

    They fill whole micro-steps from the start, so that as few as possible hold both kinds.

    Args:
        num_replay: Replay rows in all.
        replay_per_batch: Replay rows of this step over all ranks.
        seed: Seed of their order.
        start: Position of the first one in `replay_stream`.
        micro_steps: Micro-steps of this step.
        micro_batch_size: Rows of one forward pass on one rank.
        world_size: Number of ranks.
        lengths: Length of each replay row, by which rows share a micro-step; `None` for any order.
        rows_per_step: Replay rows of a whole step, where this one has fewer.

    Returns:
        Rows by micro-step and rank.

    Example:
        >>> [[len(rows) for rows in ranks] for ranks in added_rows(
        ...     9, 3, seed=0, start=15, micro_steps=2, micro_batch_size=1, world_size=2)]
        [[1, 1], [1, 0]]
    """
    stream = replay_stream(num_replay, seed, start, lengths, rows_per_step or replay_per_batch)
    rows = list(itertools.islice(stream, replay_per_batch))
    if lengths is not None:
        rows = by_length(rows, lengths)
    width = max(micro_batch_size * world_size, -(-replay_per_batch // micro_steps))
    filled = [rows[first : first + width] for first in range(0, replay_per_batch, width)]
    # From the start, as in `BatchInsertionSampler._place`.
    steps: list[list[int]] = filled + [[] for _ in range(micro_steps - len(filled))]
    return [[step[rank::world_size] for rank in range(world_size)] for step in steps]


class BatchInsertionSampler(Sampler[int]):
    """Put a fixed number of replay rows into every optimizer step.

    Task row i comes as i, replay row j as `num_task + j`. Every block of `batch_size` indices is one optimizer step.
    Each epoch has every task row once. The last block is filled by wrapping round to the epoch's first rows. Replay
    rows run through whole permutations of the replay set, one after another, across the epochs. They fill whole
    micro-steps from the end of the block. The rest goes into one mixed micro-step at its start, spread over the ranks.
    With `replay_per_batch=0` all replay rows are shuffled into the epoch once.

    Args:
        num_task: Task rows.
        num_replay: Replay rows.
        batch_size: Rows of one optimizer step over all ranks and accumulation steps.
        replay_per_batch: Replay rows among them, 0 for no batch insertion.
        seed: Seed of every order.
        epoch: Epoch that the next iteration gives.
        micro_batch_size: Rows of one forward pass on one rank; `None` if a step is one forward pass on each rank.
        world_size: Number of ranks; position p of a micro-step belongs to rank `p // micro_batch_size`.
        task_order: Order of the task rows in an epoch, `epoch -> indices`; `None` for a permutation by seed.
        tasks_per_epoch: Rows that `task_order` gives; `None` for `num_task`.
        replay_lengths: Length of each replay row. With them the replay rows of a step have similar lengths, and are
            dealt to its micro-steps and ranks by length; `None` for any order.

    Raises:
        ConfigError: If the geometry cannot hold the rows.

    Example:
        >>> sampler = BatchInsertionSampler(10, 4, batch_size=6, replay_per_batch=1)
        >>> len(sampler), sum(index >= 10 for index in sampler)
        (12, 2)
    """

    # accelerate replaces every `RandomSampler`, and sets an attribute called `generator` on all ranks. So this is a
    # plain `Sampler` without such an attribute.

    def __init__(
        self,
        num_task: int,
        num_replay: int,
        *,
        batch_size: int,
        replay_per_batch: int,
        seed: int = 0,
        epoch: int = 0,
        micro_batch_size: int | None = None,
        world_size: int = 1,
        task_order: Callable[[int], Sequence[int]] | None = None,
        tasks_per_epoch: int | None = None,
        replay_lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if micro_batch_size is None:
            micro_batch_size = batch_size // max(1, world_size)
        if tasks_per_epoch is None:
            tasks_per_epoch = num_task
        self.num_task = num_task
        self.num_replay = num_replay
        self.batch_size = batch_size
        self.replay_per_batch = replay_per_batch
        self.seed = seed
        self.epoch = epoch
        self.world_size = world_size
        self.micro_batch_size = micro_batch_size
        self._width = micro_batch_size * world_size
        self.task_order = task_order
        self.tasks_per_epoch = tasks_per_epoch
        self.replay_lengths = None if replay_lengths is None else np.asarray(replay_lengths, dtype=np.int64)
        self._check()

    @property
    def blocks_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        if self.replay_per_batch:
            return -(-self.tasks_per_epoch // (self.batch_size - self.replay_per_batch))
        return -(-(self.tasks_per_epoch + self.num_replay) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the indices that an iteration yields."""
        return self.blocks_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield the flat indices of the current epoch."""
        blocks = self._inserted_blocks() if self.replay_per_batch else self._shuffled_blocks()
        for task_rows, replay_rows in blocks:
            if self.replay_lengths is not None:
                replay_rows = by_length(replay_rows, self.replay_lengths)
            yield from self._place(task_rows, [row + self.num_task for row in replay_rows])

    def slots(self) -> Iterator[Slot]:
        """Yield the flat indices of the current epoch, each with the plan of its micro-step."""
        rows = iter(self)
        while step := list(itertools.islice(rows, self._width)):
            replay = sum(index >= self.num_task for index in step)
            for index in step:
                yield Slot(index, len(step) - replay, replay)

    def _inserted_blocks(self) -> Iterator[tuple[list[int], list[int]]]:
        replay_rows = self.replay_per_batch
        tasks = itertools.cycle(self._task_indices())
        # The epochs share one stream. Each continues where the last one ended, and a resumed run finds its place.
        start = self.epoch * self.blocks_per_epoch * replay_rows
        replay = replay_stream(self.num_replay, self.seed, start, self.replay_lengths, replay_rows)
        for _ in range(self.blocks_per_epoch):
            task_rows = list(itertools.islice(tasks, self.batch_size - replay_rows))
            yield task_rows, list(itertools.islice(replay, replay_rows))

    def _shuffled_blocks(self) -> Iterator[tuple[list[int], list[int]]]:
        """Deal the epoch's replay rows over its positions. Task rows keep their order in the other positions."""
        tasks = itertools.cycle(self._task_indices())
        total = self.tasks_per_epoch + self.num_replay
        kinds = _permutation(total, self.seed, _MIXED, self.epoch) >= self.tasks_per_epoch
        counts = np.add.reduceat(kinds, range(0, total, self.batch_size), dtype=np.int64)
        order = _permutation(self.num_replay, self.seed, _REPLAY, self.epoch)
        if self.replay_lengths is not None:
            places = _permutation(len(counts), self.seed, _PLACES, self.epoch)
            order = grouped(order, self.replay_lengths, counts, places)
        replay = iter(order.tolist())
        for count in counts.tolist():
            replay_rows = list(itertools.islice(replay, count))
            yield list(itertools.islice(tasks, self.batch_size - count)), replay_rows

    def _task_indices(self) -> list[int]:
        if self.task_order is not None:
            return list(map(int, self.task_order(self.epoch)))
        return _permutation(self.num_task, self.seed, _TASK, self.epoch).tolist()

    def _place(self, task_rows: list[int], replay_rows: list[int]) -> list[int]:
        """Order one block so that at most one micro-step holds both kinds: the first."""
        # Where two calls of the model meet in a backward pass, all gradients of the one wait for those of the other.
        # After another micro-step they would be a second copy beside its gradients.
        mixed = len(replay_rows) % self._width
        block: list[int] = []
        tasks, replay = iter(task_rows), iter(replay_rows)
        # Shares differ by one row at most, so that no rank waits long for another.
        for rank in range(self.world_size):
            share = mixed // self.world_size + (rank < mixed % self.world_size)
            block += itertools.islice(tasks, self.micro_batch_size - share)
            block += itertools.islice(replay, share)
        return block + list(tasks) + list(replay)

    def _check(self) -> None:
        width = self._width
        fits = width > 0 and self.batch_size > 0 and self.batch_size % width == 0
        least = min(1, self.replay_per_batch)
        most = self.batch_size - 1
        _require(self.tasks_per_epoch > 0, "train_dataset", "at least 1 task row", self.tasks_per_epoch)
        _require(fits, "batch_size", f"a multiple of {width} rows (micro-batch x ranks), at least 1", self.batch_size)
        _require(self.num_replay >= least, "num_replay", f"at least {least} replay rows", self.num_replay)
        if self.replay_lengths is not None:
            measured = len(self.replay_lengths)
            each = f"one for each of {self.num_replay} rows"
            _require(measured == self.num_replay, "replay_lengths", each, measured)
        fewer = f"from 0 to {most}, since an optimizer step has {self.batch_size} rows"
        _require(0 <= self.replay_per_batch <= most, "num_interpolate_per_batch", fewer, self.replay_per_batch)


def _require(ok: bool, where: str, expected: str, found: int) -> None:
    if not ok:
        raise ConfigError(
            "The rows do not fit into the batches.",
            where=where,
            expected=expected,
            found=found,
            fix="Raise per_device_train_batch_size or gradient_accumulation_steps, or lower the replay rows.",
        )


def _permutation(size: int, *key: int) -> np.ndarray:
    # A generator for each call: the order depends on its key alone, and not on what was drawn before.
    return np.random.default_rng(_seeds(*key)).permutation(size)


def _seeds(*key: int) -> np.random.SeedSequence:
    # `SeedSequence` refuses negative numbers, which a `data_seed` may be.
    return np.random.SeedSequence([part & _WORD for part in key])
