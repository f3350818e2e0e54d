"""The run folder of a sequence: where a kill left it, and what can be removed.

    sequence.json  matrix.json  logs.jsonl  gere_saving/
    task-02-NAME/trainer_state.json  task-02-NAME/checkpoint-N/  task-02-NAME/model/

A task is trained once its folder `model` exists, which gets that name when it is complete. A task is finished once its
row is in the matrix. Then its checkpoints and the model of the task before it are removed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gere._files import canonical_json, make_folder, write_atomic
from gere.continual.matrix import MATRIX_FILE
from gere.errors import ConfigError

FORMAT = 1
SEQUENCE_FILE, LOG_FILE, STATE_FILE = "sequence.json", "logs.jsonl", "trainer_state.json"
MODEL, TEMPORARY = "model", ".model.tmp"


class RunFolder:
    """Files of one sequence.

    Args:
        path: Run folder, made if it is missing.
        names: Names of the trainings: of the tasks, or of the one mixture of them.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self._names = list(names)
        make_folder(path)

    def begin(self, content: Mapping[str, Any]) -> None:
        """Write `sequence.json`, or compare it with the one that is there.

        Args:
            content: What tells this sequence from others.

        Raises:
            ConfigError: If the folder belongs to another sequence.
        """
        file = self.path / SEQUENCE_FILE
        # As it will be read back: tuples become lists, and paths text.
        now = json.loads(json.dumps({"format": FORMAT, **content}, default=str))
        if not (file.is_file() and (self.path / MATRIX_FILE).is_file()):  # nothing was measured yet
            write_atomic(file, canonical_json(now))
            return
        try:
            before, after = _flat(json.loads(file.read_text(encoding="utf-8"))), _flat(now)
        except (ValueError, AttributeError) as error:
            raise _unlike(file, "a JSON object", f"{type(error).__name__}: {error}") from error
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        if changed:
            raise _unlike(
                file,
                "; ".join(f"{name} {before.get(name)}" for name in changed) + " (the folder)",
                "; ".join(f"{name} {after.get(name)}" for name in changed) + " (now)",
            )

    def task(self, index: int) -> Path:
        """Folder of a task."""
        return self.path / f"task-{index + 1:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', self._names[index])}"

    def model(self, index: int) -> Path | None:
        """Folder of the model after a task; `None` if the task is not trained, and for -1, the base."""
        if index < 0:
            return None
        folder = self.task(index) / MODEL
        return folder if folder.is_dir() else None

    def checkpoint(self, index: int) -> Path | None:
        """Last checkpoint that a task can resume from; `None` to start it again.

        Later ones are removed: what a kill left in part, and the checkpoint of the last step, from which `Trainer`
        would take a step too many.
        """
        found = sorted(self.task(index).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        while found:
            if _has_steps_left(found[-1]):
                return found[-1]
            shutil.rmtree(found.pop())
        return None

    def keep(self, index: int, save: Callable[[str], Any]) -> None:
        """Save the model of a trained task, whole or not at all.

        Args:
            index: The task.
            save: Saves the model into a folder.
        """
        temporary = self.task(index) / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        save(str(temporary))
        temporary.rename(self.task(index) / MODEL)

    def clean_up(self, index: int) -> None:
        """Remove what nothing needs once a task is in the matrix. It may be called again."""
        for path in [*self.task(index).glob("checkpoint-*"), self.task(index) / TEMPORARY]:
            shutil.rmtree(path, ignore_errors=True)
        if index > 0:
            shutil.rmtree(self.task(index - 1) / MODEL, ignore_errors=True)

    def write_logs(self, upto: int) -> None:
        """Write the logs of all tasks up to one, one a line, each with the index of its task."""
        lines = []
        for index in range(upto + 1):
            state = json.loads((self.task(index) / STATE_FILE).read_text(encoding="utf-8"))
            lines += [json.dumps({"task": index, **log}) for log in state["log_history"]]
        write_atomic(self.path / LOG_FILE, "".join(f"{line}\n" for line in lines).encode())


def _has_steps_left(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole, and not that of the last step."""
    try:
        # `Trainer` writes this file last.
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return state["global_step"] < state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the values of nested sections with dots, such as `settings.seed`."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _unlike(file: Path, expected: str, found: str) -> ConfigError:
    return ConfigError(
        "The run folder belongs to another sequence.",
        where=file,
        expected=expected,
        found=found,
        fix="Restore the settings to resume it, or set out to another folder.",
    )
