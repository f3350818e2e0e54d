"""The run folder of a sequence: what it was begun with, where a kill left it, what can go.

    sequence.json  matrix.json  logs.jsonl  gere_saving/
    task-02-NAME/trainer_state.json  task-02-NAME/checkpoint-N/  task-02-NAME/model/

A task is trained once its `model` is there, which is renamed to that name when it is complete. It is finished once its
row is in the matrix; then its checkpoints and the model of the task before it are removed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gere._files import canonical_json, make_folder, write_atomic
from gere.continual.matrix import MATRIX_FILE
from gere.errors import ConfigError

FORMAT = 1
SEQUENCE_FILE, LOG_FILE, STATE_FILE, MODEL = "sequence.json", "logs.jsonl", "trainer_state.json", "model"


class RunFolder:
    """The files of one sequence.

    Args:
        path: Run folder, made if it is missing.
        names: Names of the steps that are trained: the tasks, or the one mixture of them.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self._names = list(names)
        make_folder(path)

    def begin(self, content: Mapping[str, Any]) -> None:
        """Write what the sequence is, or make sure that it was begun as the same.

        Raises:
            ConfigError: If the folder is one of another sequence.
        """
        file = self.path / SEQUENCE_FILE
        now = json.loads(json.dumps({"format": FORMAT, **content}, default=str))
        if not (file.is_file() and (self.path / MATRIX_FILE).is_file()):  # nothing was measured yet
            write_atomic(file, canonical_json(now))
            return
        try:
            then = json.loads(file.read_text(encoding="utf-8"))
            flat = [_flat(one) for one in (then, now)]
        except (ValueError, AttributeError) as error:
            raise _unlike(file, "a JSON object", f"{type(error).__name__}: {error}") from error
        other = sorted(name for name in {*flat[0], *flat[1]} if flat[0].get(name) != flat[1].get(name))
        if other:
            raise _unlike(
                file,
                "; ".join(f"{name} {flat[0].get(name)}" for name in other) + " (the folder)",
                "; ".join(f"{name} {flat[1].get(name)}" for name in other) + " (now)",
            )

    def task(self, index: int) -> Path:
        """Folder of a task."""
        return self.path / f"task-{index + 1:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', self._names[index])}"

    def model(self, index: int) -> Path | None:
        """The model after a task; `None` if the task is not trained, and for -1, the base."""
        folder = self.task(index) / MODEL if index >= 0 else None
        return folder if folder is not None and folder.is_dir() else None

    def checkpoint(self, index: int) -> Path | None:
        """The last checkpoint that a task can go on from.

        Later ones are removed: those that a kill left in part, and that of the last step, from which the trainer would
        take a step too many.
        """
        found = sorted(self.task(index).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        while found:
            if _has_steps_left(found[-1]):
                return found[-1]
            shutil.rmtree(found.pop())
        return None

    def keep(self, index: int, save: Any) -> None:
        """Save the model of a trained task whole or not at all.

        Args:
            index: The task.
            save: Called with the folder to save into.
        """
        begun = self.task(index) / f".{MODEL}.tmp"
        shutil.rmtree(begun, ignore_errors=True)
        save(str(begun))
        begun.rename(self.task(index) / MODEL)

    def clean_up(self, index: int) -> None:
        """Remove what nothing needs once a task is in the matrix; safe to do again."""
        for path in [*self.task(index).glob("checkpoint-*"), self.task(index) / f".{MODEL}.tmp"]:
            shutil.rmtree(path, ignore_errors=True)
        if index > 0:
            shutil.rmtree(self.task(index - 1) / MODEL, ignore_errors=True)

    def write_logs(self, upto: int) -> None:
        """Write the logs of all trained tasks, one a line, each with its task."""
        lines = []
        for index in range(upto + 1):
            state = json.loads((self.task(index) / STATE_FILE).read_text(encoding="utf-8"))
            lines += [json.dumps({"task": index, **log}) for log in state["log_history"]]
        write_atomic(self.path / LOG_FILE, "".join(f"{line}\n" for line in lines).encode())


def _has_steps_left(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole, its state being written last, and not that of the end."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return state["global_step"] < state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested sections by names with dots."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _unlike(file: Path, expected: str, found: str) -> ConfigError:
    return ConfigError(
        "The run folder was begun by another sequence.",
        where=file,
        expected=expected,
        found=found,
        fix="Restore the settings to go on, or set out to another folder.",
    )
