"""The output folder of a plain `Trainer`: what its state has logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gere.report.files import number, read_object, require, step_of
from gere.report.run import GENERAL, Curves, Run, add_log

STATE = "trainer_state.json"


def find_state(folder: Path) -> Path | None:
    """The state that is farthest, of the folder or of its newest checkpoint; `None` without one."""
    checkpoints = [path for path in folder.glob("checkpoint-*/" + STATE) if _step_of(path) >= 0]
    newest = max(checkpoints, key=_step_of, default=None)
    own = folder / STATE
    if not own.is_file() or newest is None:
        return own if own.is_file() else newest
    return max((own, newest), key=lambda path: number(read_object(path).get("global_step")) or 0.0)


def read_training(folder: Path, path: Path) -> Run:
    """Read a plain training.

    Args:
        folder: Its output folder.
        path: The state that `find_state` gives.

    Raises:
        RunFolderError: If the state is damaged.
    """
    state = read_object(path)
    logs = state.get("log_history")
    require(isinstance(logs, list), f"{path}, log_history", "a list", type(logs).__name__)
    curves: Curves = {}
    before: dict[str, float] = {}
    now: dict[str, float] = {}
    for index, log in enumerate(logs or []):
        step = step_of(log, f"{path}, log_history[{index}]")
        add_log(curves, log, step)
        _follow(log, step == 0, before, now)
    return Run(
        folder, folder.resolve().name, general_before=before, general_now=now, curves=curves, state=_state(state, logs)
    )


def _follow(log: dict[str, Any], first: bool, before: dict[str, float], now: dict[str, float]) -> None:
    """Keep the newest general ability, and what it was at the start: in the first log, or by its change since then."""
    values: Curves = {}
    add_log(values, log, 0.0)
    for key, points in values.items():
        if key.startswith(GENERAL):
            name = key.removeprefix(GENERAL)
            change = 0.0 if first else number(log.get(f"{key}_change"))
            now[name] = points[0.0]
            if change is not None:
                before.setdefault(name, now[name] - change)


def _state(state: dict[str, Any], logs: Any) -> str:
    """How far it is; a training that was stopped early has logged its end."""
    step, last = number(state.get("global_step")), number(state.get("max_steps"))
    ended = step is None or last is None or step >= last or any("train_runtime" in log for log in logs)
    return "" if ended else f"{step:,.0f} of {last:,.0f} steps"


def _step_of(path: Path) -> int:
    number = path.parent.name.partition("-")[2]
    return int(number) if number.isascii() and number.isdecimal() else -1
