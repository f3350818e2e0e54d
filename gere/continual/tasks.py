"""Tasks of a sequence: their files, their labels, and their rows as token ids."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere.config import require
from gere.continual.answers import normalised
from gere.continual.settings import SequenceSettings, require_name
from gere.evaluation.examples import TaskRow, read_task_rows
from gere.replay import rows

TRAIN, DEV = ".train.jsonl", ".dev.jsonl"


class Task(NamedTuple):
    """A task of a sequence.

    Attributes:
        name: Its name in the matrix.
        train: Rows to train on.
        dev: Rows to evaluate on.
        labels: All answers that the task knows.
        files: Files of the training rows and of the dev rows.
    """

    name: str
    train: list[TaskRow]
    dev: list[TaskRow]
    labels: tuple[str, ...]
    files: tuple[Path, Path]


def read_tasks(settings: SequenceSettings) -> list[Task]:
    """Read the tasks of a sequence, and refuse two of one name."""
    tasks = [read_task(entry, settings) for entry in settings.tasks]
    names = [task.name for task in tasks]
    require(len({*names}) == len(names), "tasks", "tasks of different names", names)
    return tasks


def read_task(entry: Any, settings: SequenceSettings) -> Task:
    """Read a task.

    Args:
        entry: A name, the path of its training file, or a mapping of `train`, `dev`, `name` and `labels`.
        settings: Settings with `task_dir` and the choice of rows.

    Raises:
        ConfigError: If a file cannot be read, a row lacks a field, or labels cannot be told apart.
    """
    given = _paths(entry, settings.task_dir)
    files = (Path(given["train"]), Path(given["dev"]))
    name = str(given.get("name") or files[0].name.removesuffix(".jsonl").removesuffix(".train"))
    train, dev = read_task_rows(files[0], "tasks"), read_task_rows(files[1], "tasks")
    labels = given.get("labels") or sorted({row.output for row in [*train, *dev]})
    # YAML reads a label such as yes or 1 as another type.
    labels = tuple(map(str, labels))
    _require_labels(name, labels, dev)
    if settings.rows is not None and settings.rows < len(train):
        # By the name, not by the place: a task has the same rows in every order of tasks.
        train = random.Random(f"{settings.seed} {name}").sample(train, settings.rows)  # noqa: S311
    dev = dev[settings.dev_skip :][: settings.dev_rows]
    require(len(dev) > 0, "dev_skip", f"less than the rows of {files[1]}", settings.dev_skip)
    return Task(name, train, dev, labels, files)


def _paths(entry: Any, folder: str | None) -> Mapping[str, Any]:
    if isinstance(entry, Mapping):
        for key in entry:
            require_name(key, ["train", "dev", "name", "labels"], "tasks")
        require({"train", "dev"} <= {*entry}, "tasks", "a mapping with train and dev", entry)
        return entry
    text = str(entry)
    if text.endswith(TRAIN):
        return {"train": text, "dev": text.removesuffix(TRAIN) + DEV}
    require(not text.endswith(".jsonl"), "tasks", f"a name, a file NAME{TRAIN}, or a mapping of train and dev", text)
    require(folder is not None, "task_dir", f"a folder that has {text}{TRAIN}", folder)
    return {"name": text, "train": Path(str(folder)) / (text + TRAIN), "dev": Path(str(folder)) / (text + DEV)}


def _require_labels(name: str, labels: Sequence[str], dev: Sequence[TaskRow]) -> None:
    """Refuse labels that are equal once they are normalised, and dev rows with another answer."""
    plain = [normalised(label) for label in labels]
    distinct = len({*plain}) == len(plain) and all(plain)
    require(distinct, f"labels of {name}", "labels that differ in letters and digits", labels)
    strange = {row.output for row in dev if normalised(row.output) not in plain}
    require(not strange, f"outputs of {name}", f"one of {', '.join(labels)}", sorted(strange)[:3])


def prompt_ids(tokenizer: Any, row: TaskRow, most: int) -> list[int]:
    """Tokenise a prompt. One with more than `most` tokens keeps its instruction and its end."""
    ids = rows.prompt_ids(tokenizer, row.prompt)
    if len(ids) <= most:
        return ids
    head = 0
    if row.instruction:
        # At most half of the room, so that a long instruction leaves some of the end.
        head = min(len(rows.prompt_ids(tokenizer, row.instruction)), most // 2)
    return ids[:head] + ids[len(ids) - (most - head) :]


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Tokenise an answer as it follows a prompt, without the token that ends it."""
    # A word after a space is another token than at the beginning of a text.
    return list(tokenizer(f" {answer}", add_special_tokens=False, verbose=False)["input_ids"])


def encode(tokenizer: Any, row: TaskRow, most: int) -> dict[str, list[int]]:
    """Make a training row of at most `most` tokens: prompt, answer, end of text. Only the last two have labels."""
    answer = [*answer_ids(tokenizer, row.output), tokenizer.eos_token_id][:most]
    prompt = prompt_ids(tokenizer, row, most - len(answer))
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}
