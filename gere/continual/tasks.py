"""Tasks of a sequence: their files, their labels, and their rows as token ids."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere.config import require
from gere.continual.answers import Labels, text_of
from gere.continual.settings import SequenceSettings, require_name
from gere.evaluation.examples import TaskRow, read_task_rows
from gere.replay import rows

TRAIN, DEV = ".train.jsonl", ".dev.jsonl"
logger = logging.getLogger("gere.continual")


class Task(NamedTuple):
    """A task of a sequence.

    Attributes:
        name: Its name in the matrix.
        train: Rows to train on.
        dev: Rows to evaluate on.
        labels: All answers that the task knows, in their most frequent spelling.
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
        ConfigError: If a file cannot be read, a row lacks a field, a label is empty, or a dev row has another answer.
    """
    given = _paths(entry, settings.task_dir)
    files = (Path(given["train"]), Path(given["dev"]))
    name = str(given.get("name") or files[0].name.removesuffix(".jsonl").removesuffix(".train"))
    train, dev = read_task_rows(files[0], "tasks"), read_task_rows(files[1], "tasks")
    labels = given.get("labels")
    if not labels:
        counts = Counter(row.output for row in [*train, *dev])
        labels = sorted(Labels([output for output, _ in counts.most_common()]))
    # YAML reads a label such as yes or 1 as another type.
    labels = _checked_labels(name, list(map(str, labels)), dev)
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


def _checked_labels(name: str, spellings: Sequence[str], dev: Sequence[TaskRow]) -> tuple[str, ...]:
    """Return the labels; refuse an empty one, and dev rows with another answer; say which are easily confused."""
    known = Labels(spellings)
    require(all(label.strip() for label in known), f"labels of {name}", "labels with text", spellings)
    strange = {row.output for row in dev if known.find(row.output) is None}
    require(not strange, f"outputs of {name}", f"one of {', '.join(known)}", sorted(strange)[:3])
    for group in known.alike():
        logger.warning(
            "%s: the labels %s differ in case, space or marks alone, so that an answer has to be written just so. If "
            "they are spellings of one label, give the task a list of its labels in `tasks`.",
            name,
            " and ".join(map(repr, group)),
        )
    return tuple(known)


def require_reachable(tokenizer: Any, task: Task, answers: str) -> None:
    """Refuse labels that no answer of the model could stand for, since it would be wrong whatever it has learned.

    Args:
        tokenizer: Tokenizer of the model.
        task: The task.
        answers: How answers are found, as `SequenceSettings.answers`.

    Raises:
        ConfigError: If the tokenizer makes another label or another text of a label.
    """
    known = Labels(task.labels)
    first: dict[tuple[int, ...], str] = {(): ""}
    changed = {}
    for label in task.labels:
        ids = tuple(answer_ids(tokenizer, label))
        same, written = first.setdefault(ids, label), text_of(tokenizer, ids)
        if same != label:
            changed[label] = same
        elif answers == "greedy" and known.find(written) != label:
            changed[label] = written
    expected = "labels that the tokenizer keeps apart; of texts that it cannot write, set answers to likelihood"
    require(not changed, f"labels of {task.name}", expected, f"the tokenizer reads them as {changed}")


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
