"""Events of the trainer that replay needs to know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class AnchorCallback(TrainerCallback):
    """Opens or builds the anchor when the model is ready and no step has been taken, and tells of the end of steps.

    At the first event a checkpoint's weights are already loaded, so that a resumed run must find its anchor on disk.

    Args:
        prepare: Called with whether the run is resumed.
        end_step: Called after each optimizer step, on every rank.
    """

    def __init__(self, prepare: Callable[[bool], None], end_step: Callable[[], None]) -> None:
        self._prepare = prepare
        self._end_step = end_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the anchor."""
        self._prepare(state.global_step > 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the step."""
        self._end_step()


class NameAnchorCallback(TrainerCallback):
    """Names the anchor in the output folder as soon as it is open.

    For frameworks that save the last model past the trainer, also when they are interrupted. Without the name, a later
    task would take the tuned model for a base.

    Args:
        name_anchor: Writes the key of the anchor into a folder.
    """

    def __init__(self, name_anchor: Callable[[Path], None]) -> None:
        self._name_anchor = name_anchor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the key; the trainer's own callback stands before this one."""
        if args.should_save:
            self._name_anchor(Path(str(args.output_dir)))
