"""Events of the trainer that replay needs to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LineCallback(TrainerCallback):
    """Calls the trainer back at the two events of base decay.

    Args:
        begin: Called before the first step, when the anchor is there.
        end_step: Called after each optimizer step, on every rank, with the number of steps.
    """

    def __init__(self, begin: Callable[[], None], end_step: Callable[[int], None]) -> None:
        self._begin = begin
        self._end_step = end_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the base weights."""
        self._begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pull the weights back."""
        self._end_step(state.global_step)


class ReplayCallback(TrainerCallback):
    """Calls the trainer back at four events.

    Args:
        begin: Called before the first step. A checkpoint's weights are loaded by then, so that a resumed training must
            find its anchor on disk.
        close_step: Called when all losses of a step are computed, before the optimizer moves.
        end_step: Called after each optimizer step, on every rank.
    """

    def __init__(
        self, begin: Callable[[], None], close_step: Callable[[], None], end_step: Callable[[], None]
    ) -> None:
        self._begin = begin
        self._close_step = close_step
        self._end_step = end_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open or build the anchor."""
        self._begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a step whose replay rows were not taken up."""
        self._close_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the weight learn of the step."""
        self._end_step()
