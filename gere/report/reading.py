"""From folders on a command line to runs, checked by their shape: nothing that is damaged is shown."""

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
    """Read run folders.

    Args:
        folders: Folders of `gere sequence`, or output folders of a `Trainer`.

    Raises:
        ConfigError: If a folder is named twice.
        RunFolderError: If a folder is no run, a file of it is damaged, or its files do not belong together.
    """
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
    if state is None:
        raise RunFolderError(
            "The folder holds no run.",
            where=folder,
            expected=f"{ABOUT} of gere sequence, or {STATE} of a Trainer, there or in a checkpoint-N",
            found="a folder without them" if folder.is_dir() else "no folder",
            fix="Name the output folder of a run; a Trainer writes its state with a checkpoint and by save_state().",
        )
    return _read_training(folder, state)


# The folder of a sequence of tasks


def _read_sequence(folder: Path) -> Run:
    """Read a sequence; what it has not come to yet is left empty."""
    path = folder / MATRIX
    about = _read_about(folder / ABOUT)
    tasks, joint = about["tasks"], about["joint"]
    matrix = _read_matrix(path, tasks)
    most = 1 if joint else len(tasks)
    scores, invalid = _rows(matrix, "accuracy", path, most), _rows(matrix, "invalid", path, most)
    done = len(scores)
    _require(len(invalid) == done, f"{path}, invalid", f"{done} rows, as in accuracy", len(invalid))
    general = _general(matrix, done, path)
    curves, ends = _read_logs(folder / LOGS, done)
    for end, values in zip([0.0, *ends], general, strict=False):
        add_log(curves, values, end)
    state = ""
    if done < most:
        state = "in training" if joint else f"{done} of {most} tasks"
    return Run(
        folder=folder,
        **about,
        scores=scores,
        invalid=invalid,
        before=_row(matrix, "before", path),
        before_invalid=_row(matrix, "before_invalid", path),
        general_before=general_of(general[0] if general else {}),
        general_now=general_of(general[done] if len(general) > done else {}),
        curves=curves,
        ends=ends,
        state=state,
    )


def _read_about(path: Path) -> dict[str, Any]:
    """Fields of a `Run` that say what a sequence is."""
    about = _read_format(path)
    name, seed = about.get("name"), about.get("seed")
    settings = about.get("settings")
    tasks: Any = about.get("tasks")
    named = isinstance(tasks, list) and len(tasks) > 0 and all(isinstance(task, str) for task in tasks)
    _require(named, f"{path}, tasks", "a list of names", repr(tasks))
    _require(isinstance(name, str), f"{path}, name", "a text", repr(name))
    _require(isinstance(seed, int), f"{path}, seed", "a whole number", repr(seed))
    joint = isinstance(settings, dict) and settings.get("mode") == "multitask"
    return {"name": name, "seed": seed, "tasks": tuple(tasks), "joint": joint}


def _read_matrix(path: Path, tasks: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        return {"tasks": list(tasks), "accuracy": [], "invalid": []}
    matrix = _read_format(path)
    found = matrix.get("tasks")
    _require(found == list(tasks), f"{path}, tasks", f"those of {ABOUT}: {list(tasks)}", found)
    return matrix


def _rows(matrix: Mapping[str, Any], key: str, path: Path, most: int) -> NDArray[np.float64]:
    """Rows of a matrix, one of each task that was trained: (R, T)."""
    rows: Any = matrix.get(key)
    size = len(matrix["tasks"])
    _require(isinstance(rows, list), f"{path}, {key}", "a list of rows", type(rows).__name__)
    _require(len(rows) <= most, f"{path}, {key}", f"at most {most} rows", len(rows))
    found = [_shares(row, size, f"{path}, {key}[{index}]") for index, row in enumerate(rows)]
    return np.array(found, dtype=np.float64).reshape(-1, size)


def _row(matrix: Mapping[str, Any], key: str, path: Path) -> NDArray[np.float64]:
    """What the untouched model has on each task: (T,)."""
    size = len(matrix["tasks"])
    row = matrix.get(key)
    if row is None:
        row = [None] * size
    return np.array(_shares(row, size, f"{path}, {key}"))


def _shares(values: Any, size: int, place: str) -> list[float]:
    """A list of `size` shares between 0 and 1, NaN for `null`."""
    _require(isinstance(values, list), place, f"a list of {size}", type(values).__name__)
    _require(len(values) == size, place, f"a list of {size}", f"a list of {len(values)}")
    found = [math.nan if value is None else number(value) for value in values]
    # NaN, which JSON of Python may hold too, is neither below 0 nor above 1.
    sound = all(value is not None and not (value < 0 or value > 1) for value in found)
    _require(sound, place, "numbers from 0 to 1, or null where nothing was evaluated", values)
    return [value for value in found if value is not None]


def _general(matrix: Mapping[str, Any], rows: int, path: Path) -> list[Mapping[str, Any]]:
    entries = matrix.get("general") or []
    sound = isinstance(entries, list) and all(isinstance(entry, dict | None) for entry in entries)
    _require(sound and len(entries) <= rows + 1, f"{path}, general", f"at most {rows + 1} objects", entries)
    return [entry or {} for entry in entries]


def _read_logs(path: Path, rows: int) -> tuple[Curves, list[float]]:
    """Curves over the steps of all tasks, which each task counts from 0, and the last step of each trained task."""
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
            add_log(curves, log, start + step)
        start += max(step for step, _ in tasks[index])
        if index < rows:
            ends.append(start)
    return curves, ends


# The output folder of a plain `Trainer`


def _find_state(folder: Path) -> Path | None:
    """The state that is farthest, of the folder or of its newest checkpoint; `None` without one."""
    checkpoints = [path for path in folder.glob("checkpoint-*/" + STATE) if _checkpoint(path) >= 0]
    newest = max(checkpoints, key=_checkpoint, default=None)
    own = folder / STATE
    if not own.is_file():
        return newest
    if newest is None:
        return own
    return max((own, newest), key=lambda path: number(_read_object(path).get("global_step")) or 0.0)


def _read_training(folder: Path, path: Path) -> Run:
    """Read a plain training; what it was at its start stands in its first log, or in its first change since then."""
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
            change = 0.0 if step == 0 else number(log.get(f"general/{name}_change"))
            now[name] = value
            if change is not None:
                before.setdefault(name, value - change)
    left = _state_of(state, logs)
    return Run(folder, folder.resolve().name, general_before=before, general_now=now, curves=curves, state=left)


def _state_of(state: Mapping[str, Any], logs: Sequence[Mapping[str, Any]]) -> str:
    """How far it is, empty at its end; a training that was stopped early has logged its end."""
    step, last = number(state.get("global_step")), number(state.get("max_steps"))
    if step is None or last is None or step >= last or any("train_runtime" in log for log in logs):
        return ""
    return f"{step:,.0f} of {last:,.0f} steps"


def _checkpoint(path: Path) -> int:
    """Step of the checkpoint that holds a file; -1 for another folder."""
    step = path.parent.name.partition("-")[2]
    return int(step) if step.isascii() and step.isdecimal() else -1


# Files


def _read_format(path: Path) -> dict[str, Any]:
    """Read a JSON object that names its format."""
    content = _read_object(path)
    _require(content.get("format") == FORMAT, f"{path}, format", FORMAT, repr(content.get("format")))
    return content


def _read_object(path: Path) -> dict[str, Any]:
    return _parse(_text(path), path, "JSON")


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a `.jsonl` file, each with its place; a last line without its end is still being written."""
    for index, line in enumerate(_text(path).split("\n")[:-1], 1):
        place = f"{path}, line {index}"
        yield place, _parse(line, place, "JSON on each line")


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


def _parse(text: str, place: object, expected: str) -> dict[str, Any]:
    content: Any = None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        _require(False, place, expected, error)
    _require(isinstance(content, dict), place, "a JSON object", type(content).__name__)
    return content


def _step_of(log: object, place: str) -> float:
    """The step of an entry of a log."""
    step = number(log.get("step")) if isinstance(log, dict) else None
    _require(step is not None and 0 <= step < math.inf, place, "an object with a step", log)
    return step or 0.0


def _require(ok: bool, where: object, expected: object, found: object) -> None:
    """Raise a `RunFolderError` about a file unless `ok`."""
    if not ok:
        raise RunFolderError(
            "A file of a run folder is damaged, or is not of this version.",
            where=where,
            expected=expected,
            found=found,
            fix="Leave this run out, or take it from a backup; a run that is resumed writes its files anew.",
        )
