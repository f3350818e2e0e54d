"""One optimizer step: the replay rows of each micro-step, and how the parts of the loss add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from gere.errors import UnsupportedSettingError
from gere.ranks import Ranks
from gere.replay.batch import RowCounts
from gere.sampler import added_rows
from gere.session.plan import ReplayPlan


class StepShare(NamedTuple):
    """How the parts of one optimizer step add up to L = T/B L_task + 1/B sum_i (CE_i + w_i D_i).

    Attributes:
        task_rows: T, over all ranks and accumulation steps.
        replay_rows: R, over all ranks and accumulation steps.
        ranks: Number of ranks, over which gradients are averaged.
        divisor: What the trainer divides each loss by, the accumulation steps; `None` if it does not divide, since the
            parent's losses of the step already add up to L_task.
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
        """Factor of the parent's loss of a micro-batch: by its rows where that loss is a mean; 0 for a dummy row."""
        if not rows_here:
            return 0.0
        if self.divisor is None:
            return self.task_rows * self.own_share / self._rows
        return rows_here * self.ranks * self.divisor / self._rows

    @property
    def replay_factor(self) -> float:
        """Factor of the sum over the replay rows of a micro-batch."""
        return self.ranks * (self.divisor or 1) / self._rows

    def logged_factor(self, rows_here: int) -> float:
        """What a parent's loss adds to the logged L_task; the mean over ranks is taken later."""
        if not rows_here:
            return 0.0
        if self.divisor is None:
            return self.own_share
        return rows_here * self.ranks / self.task_rows


class MicroStep(NamedTuple):
    """What `compute_loss` takes up in a micro-step.

    Attributes:
        replay: Indices of the replay rows that this rank runs, dummy rows among them.
        rows: Rows that count.
    """

    replay: Sequence[int]
    rows: RowCounts


NO_STEP = StepShare(0, 0, 1, None)


def share_of(rows: Sequence[RowCounts], *, ranks: int, divisor: int | None, own_mean: bool) -> StepShare:
    """How the parts of a step add up.

    Args:
        rows: Rows of each micro-step of this rank.
        ranks: Number of ranks.
        divisor: As in `StepShare`.
        own_mean: Whether the parent's losses add up to a mean over the rows of this rank alone.
    """
    task = sum(counts.task for counts in rows)
    all_task = sum(counts.all_task for counts in rows)
    all_replay = sum(counts.all_replay for counts in rows)
    own_share = 1.0
    if own_mean and all_task:
        own_share = task * ranks / all_task
    return StepShare(all_task, all_replay, ranks, divisor, own_share)


def added_parts(
    plan: ReplayPlan,
    ranks: Ranks,
    *,
    wanted: int,
    seed: int,
    step: int,
    micro_steps: int,
    rows: int,
    accumulation: int,
) -> list[tuple[RowCounts, list[int]]]:
    """Replay rows that are added to the batches of a step, by (seed, step, rank).

    Args:
        plan: Settings and replay set.
        ranks: The processes of the run.
        wanted: Replay rows of a whole step, over all ranks.
        seed: Seed of the order of replay rows.
        step: Optimizer steps before this one.
        micro_steps: Micro-steps of this step.
        rows: Task rows of a micro-step on a rank, as the trainer was told.
        accumulation: Micro-steps of a whole step.

    Returns:
        For each micro-step its rows, and the replay rows of this rank.
    """
    # The last step of an epoch can be shorter, and gets a part of the rows.
    whole = max(accumulation, micro_steps)
    shares = added_rows(
        len(plan.replay.rows),
        -(-wanted * micro_steps // whole),
        seed=seed,
        start=step * wanted,
        micro_steps=micro_steps,
        micro_batch_size=rows,
        world_size=ranks.count,
        lengths=plan.lengths,
        rows_per_step=wanted,
    )
    parts = []
    for by_rank in shares:
        own = by_rank[ranks.index]
        counts = RowCounts(rows, len(own), rows * ranks.count, sum(map(len, by_rank)))
        parts.append((counts, own))
    return parts


class Steps:
    """Hands the micro-steps of an optimizer step to `compute_loss`, each once and in order.

    Args:
        trainer: Class of the trainer, for messages.

    Attributes:
        share: How the parts of the step at hand add up; `NO_STEP` outside of a step.
    """

    def __init__(self, trainer: str) -> None:
        self.share = NO_STEP
        self._trainer = trainer
        self._left: list[MicroStep] = []
        self._taken = 0
        self._begun = False
        self._held = False
        self._replay_rows = 0

    @property
    def open(self) -> bool:
        """Whether a loss that is computed now belongs to a step."""
        return self.share is not NO_STEP and not self._held

    @property
    def replay_alone(self) -> bool:
        """Whether the next micro-step has no task row on any rank."""
        return bool(self._left) and not self._left[0].rows.all_task

    def begin(self, micro_steps: Sequence[MicroStep], share: StepShare) -> None:
        """Begin a step. What an interrupted step left, such as one that ran out of memory, is dropped."""
        self.share = share
        self._left = list(micro_steps)
        self._taken = 0
        self._begun = True
        self._replay_rows = share.replay_rows

    def take(self) -> MicroStep:
        """The next micro-step.

        Raises:
            UnsupportedSettingError: If all of the step are taken up already.
        """
        self._taken += 1
        if not self._left:
            raise self._uneven(f"{self._taken} calls or more", self._taken - 1)
        return self._left.pop(0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Compute the parent's own loss, which may call `compute_loss` again."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def close(self) -> None:
        """End the step, before the optimizer moves.

        Raises:
            UnsupportedSettingError: If a micro-step was not taken up.
        """
        left, self._left = len(self._left), []
        self.share = NO_STEP
        if left:
            raise self._uneven(f"{self._taken} calls", self._taken + left)

    def end(self) -> int:
        """Make sure, after the optimizer moved, that the step had begun here.

        Returns:
            Replay rows of the step, over all ranks.

        Raises:
            UnsupportedSettingError: If the trainer's loop does not ask for its batches where Trainer does.
        """
        begun, self._begun = self._begun, False
        if not begun:
            raise UnsupportedSettingError(
                "An optimizer step had no replay rows: the trainer's loop does not call get_batch_samples.",
                where=f"{self._trainer}._inner_training_loop",
                expected="one call of self.get_batch_samples for each optimizer step, as in transformers.Trainer",
                found="none",
                fix="Leave the loop to Trainer, and override training_step or compute_loss instead.",
            )
        return self._replay_rows

    def _uneven(self, found: str, wanted: int) -> UnsupportedSettingError:
        return UnsupportedSettingError(
            "The replay rows of an optimizer step were not taken up exactly once.",
            where=f"{self._trainer}.training_step",
            expected=f"one call of self.compute_loss in each micro-step, {wanted} in this optimizer step",
            found=found,
            fix="Call self.compute_loss(model, inputs) once in training_step; it adds the replay rows to the loss.",
        )
