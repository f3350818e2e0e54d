"""Events of the trainer that replay needs to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class AnchorCallback(TrainerCallback):
    """Opens or builds the anchor when the model is ready and no step has been taken.

    At this event a checkpoint's weights are already loaded, so that a resumed run must find its anchor on disk.

    Args:
        prepare: Called with whether the run is resumed.
    """

    def __init__(self, prepare: Callable[[bool], None]) -> None:
        self._prepare = prepare

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the anchor."""
        self._prepare(state.global_step > 0)
