"""Events of the trainer that replay needs to know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
