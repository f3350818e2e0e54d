"""Tasks of lm-evaluation-harness for those who have its package `lm-eval`: found by their names."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gere.config import require
from gere.errors import ConfigError, MissingPackageError, QuestionError
from gere.evaluation.choices import ChoiceNormalization
from gere.evaluation.questions import spread

PREFIX = "lm-eval:"
SCORES = {"characters": "acc_norm", "none": "acc"}


class HarnessTask(NamedTuple):
    """A task of lm-eval, or a group of them such as `mmlu`, whose rows all count the same.

    Attributes:
        parts: lm-eval's tasks by their names.
        rows: Part and number of each row that is measured.
        score: What lm-eval calls the accuracy that is taken, `"acc"` or `"acc_norm"`.
    """

    parts: Mapping[str, Any]
    rows: Sequence[tuple[str, int]]
    score: str


def is_harness(source: object) -> bool:
    """Whether a source of questions is a task of lm-eval."""
    return isinstance(source, str) and source.startswith(PREFIX)


def load_tasks(
    sources: Mapping[str, str],
    rules: Mapping[str, ChoiceNormalization],
    limit: int | None = None,
    path: Any = None,
) -> dict[str, HarnessTask]:
    """Find tasks and load their rows, which lm-eval takes from the hub unless a task says otherwise.

    Args:
        sources: For each name, `lm-eval:` with a task, a group or the YAML file of a task behind it.
        rules: What a log-likelihood is divided by: `"characters"` (`acc_norm`) or `"none"` (`acc`).
        limit: Rows of each, evenly spread over all rows of a group.
        path: A folder of YAML files of tasks, several, or a `TaskManager`.

    Raises:
        MissingPackageError: If lm-eval or a package that it needs is not installed.
        QuestionError: If a task is not there or cannot be loaded, or has no accuracy of each row.
        ConfigError: If a task does not have the accuracy that `rules` asks for.
    """
    specs = {name: source.removeprefix(PREFIX) for name, source in sources.items()}
    for name, rule in rules.items():
        require(rule in SCORES, f"normalization of {name}", "of a task of lm-eval 'characters' or 'none'", rule)
    with same_luck():
        manager = path if hasattr(path, "load") else _manager(list(specs.values()), path)
        return {name: _task(manager, name, spec, rules[name], limit) for name, spec in specs.items()}


def _manager(specs: Sequence[str], path: Any) -> Any:
    """lm-eval's index of tasks; that of its own ones takes seconds, and files do without it."""
    folders = [path] if isinstance(path, (str, Path)) else list(path or [])
    for folder in folders:
        require(Path(folder).is_dir(), "lm_eval_path", "a folder, several, or a TaskManager", folder)
    named = not all(Path(spec).is_file() for spec in specs)
    return module("lm_eval.tasks").TaskManager(include_path=folders or None, include_defaults=named)


def _task(manager: Any, name: str, spec: str, rule: str, limit: int | None) -> HarnessTask:
    try:
        parts = manager.load([spec])["tasks"]
        rows = [(part, row) for part, task in parts.items() for row in range(len(task.eval_docs))]
    except Exception as error:
        raise QuestionError(
            "A task of lm-eval cannot be loaded.",
            where=PREFIX + spec,
            expected="a task or a group of `lm-eval ls tasks`, or a YAML file",
            found=f"{type(error).__name__}: {error}"[:500],
            fix="Correct the name. Without a network, give a YAML file whose rows are on this machine.",
        ) from error
    if not rows:
        raise QuestionError("There are no questions.", where=PREFIX + spec, expected="at least one", found="none")
    scores = [_scores(task) for task in parts.values()]
    known = [score for score in SCORES.values() if all(score in found for found in scores)]
    if not known:
        raise QuestionError(
            "A task of lm-eval has no accuracy that is a mean over its rows.",
            where=PREFIX + spec,
            expected=" or ".join(SCORES.values()),
            found=", ".join(sorted({score for task in parts.values() for score in task.aggregation()})) or "none",
            fix="Choose another task.",
        )
    if SCORES[rule] not in known:
        other = next(rule for rule, score in SCORES.items() if score in known)
        raise ConfigError(
            "A task of lm-eval does not have the accuracy that is asked for.",
            where=PREFIX + spec,
            expected=f"{SCORES[rule]}, for normalization={rule!r}",
            found=", ".join(known),
            fix=f"normalization={{{name!r}: {other!r}}}",
        )
    return HarnessTask(parts, spread(rows, limit), SCORES[rule])


def _scores(task: Any) -> set[str]:
    """Names of the scores of a task that are means over its rows."""
    return {name for name, of in task.aggregation().items() if getattr(of, "__name__", "") == "mean"}


def module(name: str) -> Any:
    """A module of lm-eval.

    Raises:
        MissingPackageError: If lm-eval or a package that it needs is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            "A task of lm-eval is named, and the package cannot be imported.",
            where="tasks",
            expected="package lm-eval, 0.4.13 or later",
            found=error,
            fix='pip install "gere[lm-eval]", or name a task without lm-eval: before it.',
        ) from error


@contextmanager
def same_luck(device: torch.device | None = None) -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back."""
    states = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
