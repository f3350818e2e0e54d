"""What follows from the trainer that the user brings: how replay rows join its batches."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import IterableDataset, RandomSampler, WeightedRandomSampler

from gere import _compat
from gere.session.line import Decay
from gere.session.plan import ReplaySettings
from gere.session.summary import StepPlan


def kind_of(trainer: Any) -> str:
    """How the processes share the work, by accelerate's name."""
    return str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1]


def is_whole(kind: str) -> bool:
    """Whether each process holds the whole model: one process, or DDP."""
    return kind == "NO" or kind.startswith("MULTI_")


def is_wrapped(trainer: Any) -> bool:
    """Whether the model is wrapped in what takes a second backward pass through a weight for a fault."""
    return trainer.accelerator.num_processes > 1 or kind_of(trainer) == "DEEPSPEED"


def rows_of_micro_step(trainer: Any) -> int:
    """Rows of a micro-step over all ranks."""
    # Of the arguments, since new ones reset the state of the accelerator of an older trainer.
    return int(trainer.args.world_size * trainer._train_batch_size)


def may_mix(trainer: Any, rows_per_step: int, *, adding: bool) -> bool:
    """Whether a micro-step can hold task rows and replay rows."""
    return bool(adding or not rows_per_step or rows_per_step % rows_of_micro_step(trainer))


def rows_of_step(trainer: Any) -> int:
    """Rows of an optimizer step over all ranks."""
    return rows_of_micro_step(trainer) * int(trainer.args.gradient_accumulation_steps)


def why_added(trainer: Any, settings: ReplaySettings) -> str | None:
    """Why replay rows have to be added to the batches, and cannot replace task rows in them; `None` if they can.

    Args:
        trainer: The trainer.
        settings: What the user asks for.
    """
    data, mode = trainer.train_dataset, settings.config.replay_mode
    if isinstance(settings.rows_per_step, float) and rows_of_step(trainer) == 1 and mode != "replace":
        return "a step has a single row"
    if mode == "add":
        return 'gere_config.replay_mode is "add"'
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return f"train_dataset has no length ({type(data).__name__})"
    if trainer.accelerator.dataloader_config.dispatch_batches:
        return "accelerator_config.dispatch_batches is True"
    return None


def why_no_row_sampler(sampler: Any, rows: int) -> str | None:
    """Why the parent's sampler cannot be used row by row; `None` if it can.

    Args:
        sampler: What the parent's `_get_train_sampler` gives.
        rows: Rows of the training set.
    """
    if sampler is None or _compat.gives_batches(sampler) or not hasattr(sampler, "__len__"):
        return f"the sampler is a {type(sampler).__name__}, which does not give single rows in a known number"
    # Trainers such as GRPO repeat each row next to itself and need the copies in one batch. Sampling with replacement
    # repeats rows, too, but not in groups.
    if len(sampler) > rows and not isinstance(sampler, RandomSampler | WeightedRandomSampler):
        return f"the sampler ({type(sampler).__name__}) repeats rows, which the trainer may need side by side"
    return None


def step_plan(trainer: Any, replay: int, decay: Decay, *, added: bool) -> StepPlan:
    """How the training of a trainer goes, with so many replay rows in a step."""
    rows, steps = rows_of_step(trainer), int(trainer.state.max_steps)
    plain_steps = steps
    if trainer.args.max_steps <= 0 and not added:
        share = len(trainer.train_dataset) / rows
        per_epoch = math.floor(share) if trainer.args.dataloader_drop_last else math.ceil(share)
        plain_steps = math.ceil(max(1, per_epoch) * trainer.args.num_train_epochs)
    return StepPlan(rows, replay, added, steps, plain_steps, decay)
