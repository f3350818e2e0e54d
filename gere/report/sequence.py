"""The folder of a sequence of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gere.report.files import number, read_format, read_lines, require, shares, step_of
from gere.report.run import GENERAL, Curves, Run, add_log, measures

ABOUT, MATRIX, LOGS = "sequence.json", "matrix.json", "logs.jsonl"


class _About(NamedTuple):
    """What a sequence is."""

    name: str
    seed: int
    tasks: tuple[str, ...]
    joint: bool


def read_sequence(folder: Path) -> Run:
    """Read a sequence; what it has not come to yet is left empty.

    Args:
        folder: Holds `sequence.json`, and `matrix.json` and `logs.jsonl` as far as they are written.

    Raises:
        RunFolderError: If a file is damaged, or the files do not belong together.
    """
    about, path = _read_about(folder / ABOUT), folder / MATRIX
    matrix, most = _read_matrix(path, about.tasks), 1 if about.joint else len(about.tasks)
    scores, invalid = _rows(matrix, "accuracy", path, most), _rows(matrix, "invalid", path, most)
    done = len(scores)
    require(len(invalid) == done, f"{path}, invalid", f"{done} rows, as in accuracy", len(invalid))
    general = _general(matrix, done, path)
    curves, ends = _read_logs(folder / LOGS, done)
    for end, values in zip([0.0, *ends], general, strict=False):
        add_log(curves, values, end)
    return Run(
        folder=folder,
        **about._asdict(),
        scores=scores,
        invalid=invalid,
        before=_row(matrix, "before", path),
        before_invalid=_row(matrix, "before_invalid", path),
        general_before=_named(general[:1]),
        general_now=_named(general[done : done + 1]),
        curves=curves,
        ends=ends,
        state="" if done == most else "in training" if about.joint else f"{done} of {most} tasks",
    )


def _read_about(path: Path) -> _About:
    about = read_format(path)
    name, seed, tasks, settings = (about.get(key) for key in ("name", "seed", "tasks", "settings"))
    named = isinstance(tasks, list) and len(tasks) > 0 and all(isinstance(task, str) for task in tasks)
    require(named, f"{path}, tasks", "a list of names", repr(tasks))
    require(isinstance(name, str), f"{path}, name", "a text", repr(name))
    require(isinstance(seed, int), f"{path}, seed", "a whole number", repr(seed))
    joint = isinstance(settings, dict) and settings.get("mode") == "multitask"
    return _About(str(name), int(seed or 0), tuple(tasks or ()), joint)


def _read_matrix(path: Path, tasks: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        return {"tasks": list(tasks), "accuracy": [], "invalid": []}
    matrix = read_format(path)
    found = matrix.get("tasks")
    require(found == list(tasks), f"{path}, tasks", f"those of {ABOUT}: {list(tasks)}", found)
    return matrix


def _rows(matrix: Mapping[str, Any], key: str, path: Path, most: int) -> NDArray[np.float64]:
    """Rows of a matrix, one of each task that was trained: (R, T)."""
    rows, size = matrix.get(key), len(matrix["tasks"])
    require(isinstance(rows, list), f"{path}, {key}", "a list of rows", type(rows).__name__)
    require(len(rows or []) <= most, f"{path}, {key}", f"at most {most} rows", len(rows or []))
    found = [shares(row, size, f"{path}, {key}[{index}]") for index, row in enumerate(rows or [])]
    return np.array(found, dtype=np.float64).reshape(-1, size)


def _row(matrix: Mapping[str, Any], key: str, path: Path) -> NDArray[np.float64]:
    """What the untouched model has on each task: (T,)."""
    size = len(matrix["tasks"])
    row = matrix.get(key)
    return np.full(size, math.nan) if row is None else np.array(shares(row, size, f"{path}, {key}"))


def _general(matrix: Mapping[str, Any], rows: int, path: Path) -> list[Mapping[str, Any]]:
    entries = matrix.get("general") or []
    sound = isinstance(entries, list) and all(isinstance(entry, dict | None) for entry in entries)
    require(sound and len(entries) <= rows + 1, f"{path}, general", f"at most {rows + 1} objects", entries)
    return [entry or {} for entry in entries]


def _named(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Values of general ability by their name, of the one entry that there may be."""
    found: dict[str, float] = {}
    for entry in entries:
        for key in measures(entry):
            value = number(entry[key])
            if key.startswith(GENERAL) and value is not None:
                found[key.removeprefix(GENERAL)] = value
    return found


def _read_logs(path: Path, rows: int) -> tuple[Curves, list[float]]:
    """Curves over the steps of all tasks, which each task counts from 0, and the last step of each trained task."""
    if not path.is_file():
        return {}, []
    tasks: dict[int, list[tuple[float, Mapping[str, Any]]]] = {}
    for place, log in read_lines(path):
        task = log.get("task")
        require(isinstance(task, int) and task >= 0, place, "an object with the index of a task", log)
        tasks.setdefault(int(task or 0), []).append((step_of(log, place), log))
    curves: Curves = {}
    start, ends = 0.0, []
    for index in range(len(tasks)):
        if index not in tasks:
            break
        for step, log in tasks[index]:
            add_log(curves, log, start + step)
        start += max(step for step, _ in tasks[index])
        ends += [start] if index < rows else []
    return curves, ends
