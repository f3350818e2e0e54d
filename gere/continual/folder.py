"""The run folder of a sequence: how far it is, and what nothing needs any more.

    sequence.json  matrix.json  logs.jsonl  gere_saving/
    task-02-NAME/trainer_state.json  task-02-NAME/checkpoint-N/  task-02-NAME/model/

A task is trained once its folder `model` exists, and finished once its row is in the matrix. Then its checkpoints and
the model of the task before it are removed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gere._files import canonical_json, flat, make_folder, write_atomic
from gere.continual.answers import Scores
from gere.errors import ConfigError
from gere.session.resume import STATE_FILE, checkpoints_in, torn

FORMAT = 1
MATRIX_FILE, SEQUENCE_FILE = "matrix.json", "sequence.json"
LOG_FILE = "logs.jsonl"
MODEL, TEMPORARY = "model", ".model.tmp"


@dataclasses.dataclass
class Matrix:
    """Measurements of a sequence so far.

    Attributes:
        tasks: Names of the T tasks.
        accuracy: Row i holds the accuracy on each task after task i. In multi-task mode there is one row.
        invalid: Shares of answers that match no label, in the same rows.
        before: Accuracy of the base model on each task; `None` if it was not evaluated.
        before_invalid: Shares of its answers that match no label.
        general: Measurements of general ability, before training and after each task.
    """

    tasks: list[str]
    accuracy: list[list[float]] = dataclasses.field(default_factory=list)
    invalid: list[list[float]] = dataclasses.field(default_factory=list)
    before: list[float | None] = dataclasses.field(default_factory=list)
    before_invalid: list[float | None] = dataclasses.field(default_factory=list)
    general: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def add(self, scores: list[Scores], general: dict[str, float]) -> None:
        """Add the row after a task."""
        self.accuracy.append([one.accuracy for one in scores])
        self.invalid.append([one.invalid for one in scores])
        self.general.append(general)

    def begin(self, scores: list[Scores], general: dict[str, float]) -> None:
        """Set the measurements of the base model; no scores if it was not evaluated on the tasks."""
        # A place for each task all the same, since readers pair it with the names.
        self.before = [one.accuracy for one in scores] or [None] * len(self.tasks)
        self.before_invalid = [one.invalid for one in scores] or [None] * len(self.tasks)
        self.general = [general]

    def write(self, folder: Path) -> None:
        """Write `matrix.json`, whole or not at all."""
        write_atomic(folder / MATRIX_FILE, canonical_json({"format": FORMAT, **dataclasses.asdict(self)}))


def read_matrix(folder: Path) -> Matrix | None:
    """Read the matrix of a run folder; `None` if there is none yet."""
    path = folder / MATRIX_FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        return Matrix(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            "The matrix of the sequence cannot be read.",
            where=path,
            expected=f"a JSON object of format {FORMAT}",
            found=f"{type(error).__name__}: {error}",
            fix="Restore the file, or start in another folder.",
        ) from error


class RunFolder:
    """Files of one sequence in a folder, which is made; `names` are those of the trainings."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self._names = list(names)
        make_folder(path)

    def begin(self, content: Mapping[str, Any]) -> None:
        """Write `sequence.json`; or refuse a folder that belongs to another sequence, with a `ConfigError`."""
        file = self.path / SEQUENCE_FILE
        # As it will be read back: tuples become lists, and paths text.
        now = json.loads(json.dumps({"format": FORMAT, **content}, default=str))
        # A folder without a matrix has no measurement that other settings could spoil.
        if not (file.is_file() and (self.path / MATRIX_FILE).is_file()):
            write_atomic(file, canonical_json(now))
            return
        try:
            before, after = flat(json.loads(file.read_text(encoding="utf-8"))), flat(now)
        except (ValueError, AttributeError) as error:
            raise _unlike(file, "a JSON object", f"{type(error).__name__}: {error}") from error
        old, new = [], []
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                old.append(f"{name} {before.get(name)}")
                new.append(f"{name} {after.get(name)}")
        if old:
            raise _unlike(file, f"{'; '.join(old)} (the folder)", f"{'; '.join(new)} (now)")

    def task(self, index: int) -> Path:
        """Return the folder of a task."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", self._names[index])
        return self.path / f"task-{index + 1:02d}-{name}"

    def model(self, index: int) -> Path | None:
        """Return the folder of the model after a task; `None` if the task is not trained, and for -1, the base."""
        if index >= 0 and (self.task(index) / MODEL).is_dir():
            return self.task(index) / MODEL
        return None

    def checkpoint(self, index: int) -> Path | None:
        """Return the last checkpoint that a task can resume from, and remove later ones; `None` if there is none."""
        found = checkpoints_in(self.task(index))
        while found:
            if _has_steps_left(found[-1]):
                return found[-1]
            shutil.rmtree(found.pop())
        return None

    def keep(self, index: int, save: Callable[[str], Any]) -> None:
        """Save the model of a trained task by `save(folder)`, whole or not at all."""
        temporary = self.task(index) / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        save(str(temporary))
        # A rename is one step for the system. A kill before it leaves no folder `model`, which says "trained".
        temporary.rename(self.task(index) / MODEL)

    def clean_up(self, index: int) -> None:
        """Remove what nothing needs once a task is in the matrix. It may be called again after a kill."""
        for path in [*self.task(index).glob("checkpoint-*"), self.task(index) / TEMPORARY]:
            shutil.rmtree(path, ignore_errors=True)
        # Until now a kill could have made this task begin again from the model of the one before.
        if index > 0:
            shutil.rmtree(self.task(index - 1) / MODEL, ignore_errors=True)

    def write_logs(self, upto: int) -> None:
        """Write the logs of all tasks up to one, one a line, each with the index of its task."""
        lines = []
        for index in range(upto + 1):
            state = json.loads((self.task(index) / STATE_FILE).read_text(encoding="utf-8"))
            for log in state["log_history"]:
                lines.append(json.dumps({"task": index, **log}) + "\n")
        write_atomic(self.path / LOG_FILE, "".join(lines).encode())


def _has_steps_left(checkpoint: Path) -> bool:
    """Return whether a checkpoint is whole, and not that of the last step."""
    if torn(checkpoint):
        return False
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    # Resumed from the last step, a plain `Trainer` would take a step too many.
    return bool(state["global_step"] < state["max_steps"])


def _unlike(file: Path, expected: str, found: str) -> ConfigError:
    return ConfigError(
        "The run folder belongs to another sequence.",
        where=file,
        expected=expected,
        found=found,
        fix="Restore the settings to resume it, or set out to another folder.",
    )
