"""The folder of a sequence of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gere.report.files import number, read_format, read_lines, require, shares
from gere.report.run import GENERAL, Curves, Run, add_log, measures

ABOUT, MATRIX, LOGS = "sequence.json", "matrix.json", "logs.jsonl"


def read_sequence(folder: Path) -> Run:
    """Read a sequence; what it has not come to yet is left empty.

    Args:
        folder: Holds `sequence.json`, and `matrix.json` and `logs.jsonl` as far as they are written.

    Raises:
        RunFolderError: If a file is damaged, or the files do not belong together.
    """
    path = folder / ABOUT
    about = read_format(path)
    name, seed, tasks = about.get("name"), about.get("seed"), about.get("tasks")
    named = isinstance(tasks, list) and len(tasks) > 0 and all(isinstance(task, str) for task in tasks)
    require(named, f"{path}, tasks", "a list of names", repr(tasks))
    require(isinstance(name, str), f"{path}, name", "a text", repr(name))
    require(isinstance(seed, int), f"{path}, seed", "a whole number", repr(seed))
    matrix = _read_matrix(folder / MATRIX, tuple(tasks or ()))
    scores, size = _rows(matrix, "accuracy", folder / MATRIX), len(tasks or ())
    invalid = scores * math.nan if matrix.get("invalid") is None else _rows(matrix, "invalid", folder / MATRIX)
    require(len(invalid) == len(scores), f"{folder / MATRIX}, invalid", f"{len(scores)} rows", len(invalid))
    general = _general(matrix, len(scores), folder / MATRIX)
    curves, ends = _read_logs(folder / LOGS, len(scores))
    for end, values in zip([0.0, *ends], general, strict=False):
        add_log(curves, values, end)
    return Run(
        folder=folder,
        name=str(name),
        seed=seed,
        tasks=tuple(tasks or ()),
        scores=scores,
        invalid=invalid,
        before=np.array(shares(matrix.get("before", [None] * size), size, f"{folder / MATRIX}, before")),
        general_before=_named(general[:1]),
        general_now=_named(general[len(scores) : len(scores) + 1]),
        curves=curves,
        ends=ends,
        state="" if len(scores) == size else f"{len(scores)} of {size} tasks",
    )


def _read_matrix(path: Path, tasks: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        return {"tasks": list(tasks), "accuracy": []}
    matrix = read_format(path)
    require(
        matrix.get("tasks") == list(tasks), f"{path}, tasks", f"those of {ABOUT}: {list(tasks)}", matrix.get("tasks")
    )
    return matrix


def _rows(matrix: Mapping[str, Any], key: str, path: Path) -> NDArray[np.float64]:
    """Rows of a matrix, one of each task that was trained: (R, T)."""
    rows, size = matrix.get(key), len(matrix["tasks"])
    require(isinstance(rows, list), f"{path}, {key}", "a list of rows", type(rows).__name__)
    require(len(rows or []) <= size, f"{path}, {key}", f"at most {size} rows", len(rows or []))
    found = [shares(row, size, f"{path}, {key}[{index}]") for index, row in enumerate(rows or [])]
    return np.array(found, dtype=np.float64).reshape(-1, size)


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
        task, step = log.get("task"), number(log.get("step"))
        require(isinstance(task, int) and task >= 0 and step is not None, place, "a task and a step", dict(log))
        tasks.setdefault(task or 0, []).append((step or 0.0, log))
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
