"""From folders on a command line to runs, checked by their shape: nothing that is damaged is shown.

Every file that cannot be used raises a `RunFolderError` with its place.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gere._files import flat
from gere.errors import ConfigError, RunFolderError
from gere.report.runs import CHANGE, GENERAL, LOSS, Curves, Run, curves_of, general_at, number

FORMAT = 1
ABOUT, MATRIX, LOGS, STATE = "sequence.json", "matrix.json", "logs.jsonl", "trainer_state.json"
# The folder of a training says its seed, as in `out-seed-1`; its state does not.
SEED_OF_FOLDER = re.compile(r"[-_. ]*seed[-_. ]*(\d+)$")
# Settings that seeds of one thing may differ in. The names and hashes of the tasks stand beside the settings.
OF_A_SEED = re.compile(r"(.*\.)?(seed|data_seed|logging_dir|run_name|gere_hidden_state_saving_dir)|tasks|task_dir")
ABOUT_TRAINING = ("max_steps", "num_train_epochs", "train_batch_size")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read folders of `gere sequence`, or output folders of a `Trainer`, each named once."""
    twice = [str(path) for path, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise ConfigError(
            "A run is named twice.",
            where="RUN",
            expected="each folder once: an interval takes the runs of a group for independent",
            found=", ".join(twice),
            fix="Name it once.",
        )
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Run:
    try:
        if (folder / ABOUT).is_file():
            return _read_sequence(folder)
        state = _find_state(folder)
        if state is not None:
            return _read_training(folder, state)
    except OSError as error:
        raise RunFolderError(
            "A run folder cannot be read.",
            where=error.filename or folder,
            expected="a folder that this process may read",
            found=f"{type(error).__name__}: {error.strerror or error}",
            fix="Leave this run out, or make the folder readable.",
        ) from error
    raise RunFolderError(
        "The folder holds no run.",
        where=folder,
        expected=f"{ABOUT} of gere sequence, or {STATE} of a Trainer, there or in a checkpoint-N",
        found="a folder without them" if folder.is_dir() else "no folder",
        fix="Name the output folder of a run. A Trainer writes its state with a checkpoint and by save_state().",
    )


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


# The folder of a sequence of tasks


def _read_sequence(folder: Path) -> Run:
    """Read a sequence; what it has not come to yet is left empty."""
    about, path = _read_about(folder), folder / MATRIX
    size = len(about["tasks"])
    most = 1 if about["joint"] else size
    matrix: dict[str, Any] = {"accuracy": [], "invalid": []}
    if path.is_file():
        matrix = _read_format(path)
        # A matrix of other tasks would be drawn under the names of these.
        same = matrix.get("tasks") == list(about["tasks"])
        _require(same, f"{path}, tasks", f"those of {ABOUT}: {list(about['tasks'])}", matrix.get("tasks"))
        about["date"] = _date(path)
    for name, key, before in (("scores", "accuracy", "before"), ("invalid", "invalid", "before_invalid")):
        row = matrix.get(before)
        first = _shares([[None] * size if row is None else row], size, 1, f"{path}, {before}")
        about[name] = np.vstack([first, _shares(matrix.get(key), size, most, f"{path}, {key}")])
    done, answers = len(about["scores"]) - 1, len(about["invalid"]) - 1
    _require(answers == done, f"{path}, invalid", f"{done} rows, as in accuracy", answers)
    general = matrix.get("general") or []
    sound = isinstance(general, list) and all(isinstance(entry, dict | None) for entry in general)
    _require(sound and len(general) <= done + 1, f"{path}, general", f"at most {done + 1} objects", general)
    # By the number of trained tasks, since without logs nobody knows the steps.
    measured = curves_of([(float(trained), entry or {}) for trained, entry in enumerate(general)])
    losses = measured.get(GENERAL + LOSS, {})
    if 0 in losses:
        measured[GENERAL + CHANGE] = {trained: loss - losses[0] for trained, loss in losses.items()}
    curves, ends = _read_logs(folder / LOGS, done)
    steps = [0.0, *ends]
    for key, values in measured.items():
        # In place of what the trainer logged under the same key: it measures other texts.
        curves[key] = {steps[int(trained)]: value for trained, value in values.items() if trained < len(steps)}
    if done < most:
        about["state"] = "in training" if about["joint"] else f"{done} of {most} tasks"
    return Run(
        folder=folder,
        **about,
        general_before=general_at(measured, last=False),
        general_now=general_at({key: values for key, values in measured.items() if done in values}, last=True),
        curves=curves,
        ends=ends,
    )


def _read_about(folder: Path) -> dict[str, Any]:
    """Read the fields of a `Run` that say what a sequence is."""
    path = folder / ABOUT
    about = _read_format(path)
    name, seed, tasks, settings = (about.get(key) for key in ("name", "seed", "tasks", "settings"))
    named = isinstance(tasks, list) and len(tasks) > 0 and all(isinstance(task, str) for task in tasks)
    _require(named, f"{path}, tasks", "a list of names", repr(tasks))
    # A sequence that was given no name has none here.
    _require("name" in about and isinstance(name, str | None), f"{path}, name", "a text or null", repr(name))
    _require(isinstance(seed, int), f"{path}, seed", "a whole number", repr(seed))
    every = flat(settings) if isinstance(settings, dict) else {}
    kept = {
        key: every[key] for key in sorted(every, key=lambda key: (key != "model", key)) if not OF_A_SEED.fullmatch(key)
    }
    return {
        "name": folder.resolve().name if name is None else name,
        "kind": json.dumps([name, tasks, about.get("files"), kept], sort_keys=True),
        "seed": seed,
        "date": _date(path),
        "settings": {key: value for key, value in kept.items() if value not in (None, [])},
        "tasks": tuple(tasks or ()),
        "joint": every.get("mode") == "multitask",
    }


def _shares(rows: Any, size: int, most: int, place: str) -> NDArray[np.float64]:
    """Read at most `most` rows of `size` shares between 0 and 1, NaN for `null`: (R, T)."""
    _require(isinstance(rows, list), place, "a list of rows", type(rows).__name__)
    _require(len(rows) <= most, place, f"at most {most} rows", len(rows))
    for index, row in enumerate(rows):
        _require(isinstance(row, list) and len(row) == size, f"{place}[{index}]", f"a list of {size}", row)
        for value in row:
            share = math.nan if value is None else number(value)
            # NaN, which JSON of Python may hold too, is neither below 0 nor above 1.
            if share is None or share < 0 or share > 1:
                raise _damaged(f"{place}[{index}]", "numbers from 0 to 1, or null where nothing was evaluated", row)
    return np.array(rows, dtype=np.float64).reshape(-1, size)


def _read_logs(path: Path, rows: int) -> tuple[Curves, list[float]]:
    """Read the curves over the steps of all tasks, and the last step of each trained task."""
    if not path.is_file():
        return {}, []
    tasks: dict[int, list[tuple[float, dict[str, Any]]]] = {}
    for place, log in _read_lines(path):
        task: Any = log.get("task")
        _require(isinstance(task, int) and task >= 0, place, "an object with the index of a task", log)
        tasks.setdefault(task, []).append((_step_of(log, place), log))
    logs: list[tuple[float, dict[str, Any]]] = []
    start, ends = 0.0, []
    for index in range(len(tasks)):
        # Without the log of a task nobody knows where the next one starts.
        if index not in tasks:
            break
        logs += [(start + step, log) for step, log in tasks[index]]  # each task counts its steps from 0
        start += max(step for step, _ in tasks[index])
        if index < rows:  # a task in training has a log, and no end yet
            ends.append(start)
    return curves_of(logs), ends


# The output folder of a plain `Trainer`


def _find_state(folder: Path) -> Path | None:
    """Find the state that is farthest, of the folder or of a checkpoint."""
    # A resumed run that was stopped leaves an old state beside newer checkpoints.
    states = [path for path in (folder / STATE, *sorted(folder.glob("checkpoint-*/" + STATE))) if path.is_file()]
    return max(states, key=lambda path: number(_read_object(path).get("global_step")) or 0.0, default=None)


def _read_training(folder: Path, path: Path) -> Run:
    """Read a plain training."""
    state = _read_object(path)
    logs: Any = state.get("log_history")
    _require(isinstance(logs, list), f"{path}, log_history", "a list", type(logs).__name__)
    curves = curves_of([(_step_of(log, f"{path}, log_history[{index}]"), log) for index, log in enumerate(logs)])
    before, now = general_at(curves, last=False), general_at(curves, last=True)
    if LOSS in now and CHANGE in now:
        before.setdefault(LOSS, now[LOSS] - now[CHANGE])
    elif LOSS in now and LOSS in before:
        now[CHANGE] = now[LOSS] - before[LOSS]
    losses = [number(log["eval_loss"]) for log in logs if "eval_loss" in log]
    full = folder.resolve().name
    seed = SEED_OF_FOLDER.search(full)
    name = SEED_OF_FOLDER.sub("", full) or full
    return Run(
        folder=folder,
        name=name,
        kind=name,
        seed=int(seed[1]) if seed else None,
        date=_date(path),
        settings={**_model(path.parent), **{key: state[key] for key in ABOUT_TRAINING if key in state}},
        eval_loss=losses[-1] if losses and losses[-1] is not None else math.nan,
        general_before=before,
        general_now=now,
        curves=curves,
        state=_state_of(state, logs),
    )


def _model(folder: Path) -> dict[str, Any]:
    """Name the base model of an adapter, or the class of a model, that lies beside the state."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "architectures")):
        if (folder / file).is_file():
            return {"model": _read_object(folder / file).get(key)}
    return {}


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
