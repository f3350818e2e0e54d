"""The matrix of a sequence: accuracy on task j after task i."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gere._files import canonical_json, write_atomic
from gere.continual.answers import Scores
from gere.errors import ConfigError

FORMAT = 1
MATRIX_FILE = "matrix.json"


@dataclasses.dataclass
class Matrix:
    """Measurements of a sequence so far.

    Attributes:
        tasks: Names of the T tasks.
        accuracy: Row i holds the accuracy on each task after task i. In multi-task mode there is one row, after all.
        invalid: Shares of answers that are no label, in the same rows.
        before: Accuracy of the base model on each task; `None` if it was not evaluated.
        before_invalid: Shares of its answers that are no label.
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

    def begin(self, scores: list[Scores] | None, general: dict[str, float]) -> None:
        """Set the measurements of the base model; `None` if it was not evaluated on the tasks."""
        self.before = [None] * len(self.tasks)
        self.before_invalid = [None] * len(self.tasks)
        if scores is not None:
            self.before = [one.accuracy for one in scores]
            self.before_invalid = [one.invalid for one in scores]
        self.general = [general]

    def write(self, folder: Path) -> None:
        """Write `matrix.json`, whole or not at all.

        Raises:
            CacheFolderError: If the folder cannot be written.
        """
        write_atomic(folder / MATRIX_FILE, canonical_json({"format": FORMAT, **dataclasses.asdict(self)}))


def read_matrix(folder: Path) -> Matrix | None:
    """Read the matrix of a run folder; `None` if there is none yet.

    Raises:
        ConfigError: If it cannot be read.
    """
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
