"""The run folder of a sequence: how far it is, and what nothing needs any more.

    sequence.json  matrix.json  logs.jsonl  gere_saving/
    task-02-NAME/trainer_state.json  task-02-NAME/checkpoint-N/  task-02-NAME/model/

A task is trained once its folder `model` exists, and finished once its row is in the matrix. Then its checkpoints and
the model of the task before it are removed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gere._files import canonical_json, flat, folder_errors, make_folder, remove, write_atomic
from gere._records import read_record
from gere.continual.answers import Scores
from gere.errors import ConfigError, brief
from gere.session.checkpoint import STATE_FILE, read_state
from gere.session.resume import checkpoints_in, torn

FORMAT: Literal[1] = 1
MATRIX_FILE, SEQUENCE_FILE = "matrix.json", "sequence.json"
LOG_FILE, HASHED = "logs.jsonl", ("files.general", "files.ability")
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
        general: Measurements of general ability, before training and after each task; `None` for NaN and infinity,
            which a model that has diverged gives and JSON does not know.
        format: Version of the file.
    """

    tasks: list[str]
    accuracy: list[list[float]] = dataclasses.field(default_factory=list)
    invalid: list[list[float]] = dataclasses.field(default_factory=list)
    before: list[float | None] = dataclasses.field(default_factory=list)
    before_invalid: list[float | None] = dataclasses.field(default_factory=list)
    general: list[dict[str, float | None]] = dataclasses.field(default_factory=list)
    format: Literal[1] = FORMAT

    def add(self, scores: list[Scores], general: dict[str, float]) -> None:
        """Add the row after a task."""
        self.accuracy.append([one.accuracy for one in scores])
        self.invalid.append([one.invalid for one in scores])
        self.general.append(_in_json(general))

    def begin(self, scores: list[Scores], general: dict[str, float]) -> None:
        """Set the measurements of the base model; no scores if it was not evaluated on the tasks."""
        # A place for each task all the same, since readers pair it with the names.
        self.before = [one.accuracy for one in scores] or [None] * len(self.tasks)
        self.before_invalid = [one.invalid for one in scores] or [None] * len(self.tasks)
        self.general = [_in_json(general)]

    def write(self, folder: Path) -> None:
        """Write `matrix.json`, whole or not at all."""
        write_atomic(folder / MATRIX_FILE, canonical_json(dataclasses.asdict(self)))


def _in_json(general: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in general.items()}


def read_matrix(folder: Path) -> Matrix | None:
    """Read the matrix of a run folder; `None` if there is none yet, a `ConfigError` if it cannot be used."""
    path = folder / MATRIX_FILE
    if not path.is_file():
        return None
    matrix = read_record(path, Matrix, _damaged)
    size, done = len(matrix.tasks), len(matrix.accuracy)
    rows: list[Sequence[float | None]] = [*matrix.accuracy, *matrix.invalid]
    rows += filter(None, [matrix.before, matrix.before_invalid])
    sound = all(len(row) == size for row in rows) and done == len(matrix.invalid) <= size
    # General ability is measured before training, too.
    if not sound or len(matrix.general) != bool(matrix.general) + done:
        raise _damaged(str(path), f"rows of {size} values, one after each training", "others")
    return matrix


def _damaged(where: str, expected: str, found: str) -> ConfigError:
    return ConfigError(
        "A file of the sequence cannot be used.",
        where=where,
        expected=expected,
        found=found,
        fix="Restore the file, or start in another folder.",
    )


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
            before, after = flat(read_record(file, dict[str, Any], _damaged)), flat(now)
        except RecursionError as error:
            raise _damaged(str(file), "settings by name", "an object that is nested too deep") from error
        old, new = [], []
        for name in sorted({*before, *after}):
            # Before 0.2 the files of general texts and of questions had no hash.
            unknown = name.startswith(HASHED) and name not in before
            if before.get(name) != after.get(name) and not unknown:
                old.append(f"{name} {brief(before.get(name))}")
                new.append(f"{name} {brief(after.get(name))}")
        if old:
            raise _unlike(file, f"{'; '.join(old)} (the folder)", f"{'; '.join(new)} (now)")

    def task(self, index: int) -> Path:
        """Return the folder of a task."""
        # A file system takes 255 letters.
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", self._names[index])[:200]
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
            with folder_errors(found[-1]):
                remove(found.pop())
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
            logged = read_state(self.task(index), _damaged).log_history
            if logged is None:
                raise _damaged(f"{self.task(index)}/{STATE_FILE}, log_history", "a list", "nothing")
            for log in logged:
                lines.append(json.dumps({"task": index, **log}) + "\n")
        write_atomic(self.path / LOG_FILE, "".join(lines).encode())


def _has_steps_left(checkpoint: Path) -> bool:
    """Return whether a checkpoint is whole, and not that of the last step."""
    if torn(checkpoint):
        return False
    try:
        state = read_state(checkpoint, _damaged)
    except ConfigError:
        return False
    # Resumed from the last step, a plain `Trainer` would take a step too many.
    return state.global_step < state.max_steps


def _unlike(file: Path, expected: str, found: str) -> ConfigError:
    return ConfigError(
        "The run folder belongs to another sequence.",
        where=file,
        expected=expected,
        found=found,
        fix="Restore the settings to resume it, or set out to another folder.",
    )
