"""From folders on a command line to runs, checked by their shape: nothing that is damaged is shown.

Every file that cannot be used raises a `RunFolderError` with its place.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gere.errors import ConfigError, RunFolderError
from gere.report.runs import Curves, Run, add_log, general_of, number

FORMAT = 1
ABOUT, MATRIX, LOGS, STATE = "sequence.json", "matrix.json", "logs.jsonl", "trainer_state.json"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read folders of `gere sequence`, or output folders of a `Trainer`, each named once."""
    twice = [str(path) for path, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise ConfigError(
            "A run is named twice.",
            where="RUN",
            expected="each folder once: an interval takes the runs of a name for independent",
            found=", ".join(twice),
            fix="Name it once.",
        )
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Run:
    if (folder / ABOUT).is_file():
        return _read_sequence(folder)
    state = _find_state(folder)
    if state is not None:
        return _read_training(folder, state)
    found = "a folder without them" if folder.is_dir() else "no folder"
    raise RunFolderError(
        "The folder holds no run.",
        where=folder,
        expected=f"{ABOUT} of gere sequence, or {STATE} of a Trainer, there or in a checkpoint-N",
        found=found,
        fix="Name the output folder of a run. A Trainer writes its state with a checkpoint and by save_state().",
    )


# The folder of a sequence of tasks


def _read_sequence(folder: Path) -> Run:
    """Read a sequence; what it has not come to yet is left empty."""
    about, path = _read_about(folder / ABOUT), folder / MATRIX
    matrix = _read_matrix(path, about["tasks"])
    most = 1 if about["joint"] else len(about["tasks"])
    scores, invalid = _rows(matrix, "accuracy", path, most), _rows(matrix, "invalid", path, most)
    done = len(scores)
    _require(len(invalid) == done, f"{path}, invalid", f"{done} rows, as in accuracy", len(invalid))
    general = matrix.get("general") or []
    sound = isinstance(general, list) and all(isinstance(entry, dict | None) for entry in general)
    _require(sound and len(general) <= done + 1, f"{path}, general", f"at most {done + 1} objects", general)
    general += [None] * (done + 1 - len(general))
    curves, ends = _read_logs(folder / LOGS, done)
    # The matrix has general ability after each task. Without the log of a task its last step is not known.
    for end, values in zip([0.0, *ends], general, strict=False):
        add_log(curves, values or {}, end)
    state = ""
    if done < most:
        state = "in training" if about["joint"] else f"{done} of {most} tasks"
    return Run(
        folder=folder,
        **about,
        scores=scores,
        invalid=invalid,
        before=_row(matrix, "before", path),
        before_invalid=_row(matrix, "before_invalid", path),
        general_before=general_of(general[0] or {}),
        general_now=general_of(general[done] or {}),
        curves=curves,
        ends=ends,
        state=state,
    )


def _read_about(path: Path) -> dict[str, Any]:
    """Read the fields of a `Run` that say what a sequence is."""
    about = _read_format(path)
    name, seed, tasks = about.get("name"), about.get("seed"), about.get("tasks")
    settings = about.get("settings")
    named = isinstance(tasks, list) and len(tasks) > 0 and all(isinstance(task, str) for task in tasks)
    _require(named, f"{path}, tasks", "a list of names", repr(tasks))
    _require(isinstance(name, str), f"{path}, name", "a text", repr(name))
    _require(isinstance(seed, int), f"{path}, seed", "a whole number", repr(seed))
    joint = isinstance(settings, dict) and settings.get("mode") == "multitask"
    return {"name": name, "seed": seed, "tasks": tuple(tasks or ()), "joint": joint}


def _read_matrix(path: Path, tasks: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        return {"tasks": list(tasks), "accuracy": [], "invalid": []}
    matrix = _read_format(path)
    found = matrix.get("tasks")
    # A matrix of other tasks would be drawn under the names of these.
    _require(found == list(tasks), f"{path}, tasks", f"those of {ABOUT}: {list(tasks)}", found)
    return matrix


def _rows(matrix: Mapping[str, Any], key: str, path: Path, most: int) -> NDArray[np.float64]:
    """Read the rows of the trained tasks, (R, T)."""
    rows: Any = matrix.get(key)
    size = len(matrix["tasks"])
    _require(isinstance(rows, list), f"{path}, {key}", "a list of rows", type(rows).__name__)
    _require(len(rows) <= most, f"{path}, {key}", f"at most {most} rows", len(rows))
    found = [_shares(row, size, f"{path}, {key}[{index}]") for index, row in enumerate(rows)]
    return np.array(found, dtype=np.float64).reshape(-1, size)


def _row(matrix: Mapping[str, Any], key: str, path: Path) -> NDArray[np.float64]:
    """Read the row of the untouched model, (T,)."""
    size = len(matrix["tasks"])
    if matrix.get(key) is None:
        return np.full(size, math.nan)
    return np.array(_shares(matrix[key], size, f"{path}, {key}"))


def _shares(values: Any, size: int, place: str) -> list[float]:
    """Read `size` shares between 0 and 1, NaN for `null`."""
    _require(isinstance(values, list) and len(values) == size, place, f"a list of {size}", values)
    found = []
    for value in values:
        share = number(value)
        if value is None:
            share = math.nan
        # NaN, which JSON of Python may hold too, is neither below 0 nor above 1.
        if share is None or share < 0 or share > 1:
            raise _damaged(place, "numbers from 0 to 1, or null where nothing was evaluated", values)
        found.append(share)
    return found


def _read_logs(path: Path, rows: int) -> tuple[Curves, list[float]]:
    """Read the curves over the steps of all tasks, and the last step of each trained task."""
    if not path.is_file():
        return {}, []
    tasks: dict[int, list[tuple[float, dict[str, Any]]]] = {}
    for place, log in _read_lines(path):
        task: Any = log.get("task")
        _require(isinstance(task, int) and task >= 0, place, "an object with the index of a task", log)
        tasks.setdefault(task, []).append((_step_of(log, place), log))
    curves: Curves = {}
    start, ends = 0.0, []
    for index in range(len(tasks)):
        # Without the log of a task nobody knows where the next one starts.
        if index not in tasks:
            break
        for step, log in tasks[index]:
            add_log(curves, log, start + step)  # each task counts its steps from 0
        start += max(step for step, _ in tasks[index])
        if index < rows:  # a task in training has a log, and no end yet
            ends.append(start)
    return curves, ends


# The output folder of a plain `Trainer`


def _find_state(folder: Path) -> Path | None:
    """Find the state that is farthest, of the folder or of its newest checkpoint."""
    # A resumed run that was stopped leaves an old state beside newer checkpoints.
    checkpoints = sorted(folder.glob("checkpoint-*/" + STATE), key=_checkpoint)
    states = [path for path in (folder / STATE, *checkpoints[-1:]) if path.is_file()]
    return max(states, key=lambda path: number(_read_object(path).get("global_step")) or 0.0, default=None)


def _checkpoint(path: Path) -> int:
    """Return the step of the checkpoint that holds a file; -1 for another folder."""
    step = path.parent.name.partition("-")[2]
    if step.isascii() and step.isdecimal():
        return int(step)
    return -1


def _read_training(folder: Path, path: Path) -> Run:
    """Read a plain training."""
    state = _read_object(path)
    logs: Any = state.get("log_history")
    _require(isinstance(logs, list), f"{path}, log_history", "a list", type(logs).__name__)
    curves: Curves = {}
    before: dict[str, float] = {}
    now: dict[str, float] = {}
    for index, log in enumerate(logs):
        step = _step_of(log, f"{path}, log_history[{index}]")
        add_log(curves, log, step)
        for name, value in general_of(log).items():
            now[name] = value
            if step == 0:
                before.setdefault(name, value)
            # Without a log of step 0 the value then follows from the first change since then.
            change = number(log.get(f"general/{name}_change"))
            if change is not None:
                before.setdefault(name, value - change)
    left = _state_of(state, logs)
    return Run(folder, folder.resolve().name, general_before=before, general_now=now, curves=curves, state=left)


def _state_of(state: Mapping[str, Any], logs: Sequence[Mapping[str, Any]]) -> str:
    """Tell how far it is, empty at its end."""
    step, last = number(state.get("global_step")), number(state.get("max_steps"))
    # A training that was stopped early, such as by a callback, has logged its end.
    if step is None or last is None or step >= last or any("train_runtime" in log for log in logs):
        return ""
    return f"{step:,.0f} of {last:,.0f} steps"


# Files


def _read_format(path: Path) -> dict[str, Any]:
    content = _read_object(path)
    _require(content.get("format") == FORMAT, f"{path}, format", FORMAT, repr(content.get("format")))
    return content


def _read_object(path: Path) -> dict[str, Any]:
    return _parse(_text(path), path)


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a `.jsonl` file, each with its place."""
    # A last line without its end is still being written.
    for index, line in enumerate(_text(path).split("\n")[:-1], 1):
        place = f"{path}, line {index}"
        yield place, _parse(line, place)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(
            "A file of a run folder cannot be read.",
            where=path,
            expected="a text file in UTF-8",
            found=f"{type(error).__name__}: {error}",
            fix="Leave this run out, or make the file readable.",
        ) from error


def _parse(text: str, place: object) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(place, "JSON", error) from error
    _require(isinstance(content, dict), place, "a JSON object", type(content).__name__)
    return content


def _step_of(log: object, place: str) -> float:
    step = number(log.get("step")) if isinstance(log, dict) else None
    if step is None or not 0 <= step < math.inf:
        raise _damaged(place, "an object with a step", log)
    return step


def _require(ok: bool, where: object, expected: object, found: object) -> None:
    if not ok:
        raise _damaged(where, expected, found)


def _damaged(where: object, expected: object, found: object) -> RunFolderError:
    return RunFolderError(
        "A file of a run folder is damaged, or is not of this version.",
        where=where,
        expected=expected,
        found=found,
        fix="Leave this run out, or take it from a backup; a run that is resumed writes its files anew.",
    )
