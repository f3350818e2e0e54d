"""Tasks of a sequence: their files, their labels, and their rows as token ids."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere._files import numbered_lines
from gere.config import require
from gere.continual.answers import normalised
from gere.continual.settings import SequenceSettings, require_name
from gere.errors import ConfigError

TRAIN, DEV = ".train.jsonl", ".dev.jsonl"


class TaskRow(NamedTuple):
    """One question of a task.

    Attributes:
        instruction: The question, usually the same in all rows of a task; empty if there is none.
        input: The text that it is about.
        output: The right answer.
    """

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """Text that the model reads before its answer."""
        return self.instruction + self.input


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
    train, dev = _read_rows(files[0]), _read_rows(files[1])
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


def _read_rows(path: Path) -> list[TaskRow]:
    try:
        rows = [_row(record, line) for line, record in numbered_lines(path)]
        if not rows:
            raise ValueError("no rows")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "A task file cannot be read.",
            where=path,
            expected="JSON lines with input and output, and instruction where there is one",
            found=f"{type(error).__name__}: {error}",
            fix="Correct tasks or task_dir, or the file.",
        ) from error
    return rows


def _row(record: Any, line: int) -> TaskRow:
    if not isinstance(record, dict):
        raise ValueError(f"line {line} of the file: a JSON {type(record).__name__}, which is no record")
    for name in ("input", "output"):
        # `str(None)` would make a label "None" of it.
        if record.get(name) is None:
            fault = "null" if name in record else "missing"
            raise ValueError(f"line {line} of the file: {name} is {fault}")
    instruction = record.get("instruction")
    if instruction is None:
        instruction = ""
    return TaskRow(str(instruction), str(record["input"]), str(record["output"]))


def _require_labels(name: str, labels: Sequence[str], dev: Sequence[TaskRow]) -> None:
    """Refuse labels that are equal once they are normalised, and dev rows with another answer."""
    plain = [normalised(label) for label in labels]
    distinct = len({*plain}) == len(plain) and all(plain)
    require(distinct, f"labels of {name}", "labels that differ in letters and digits", labels)
    strange = {row.output for row in dev if normalised(row.output) not in plain}
    require(not strange, f"outputs of {name}", f"one of {', '.join(labels)}", sorted(strange)[:3])


def prompt_ids(tokenizer: Any, row: TaskRow, most: int) -> list[int]:
    """Tokenise a prompt. One with more than `most` tokens keeps its instruction and its end."""
    ids = list(tokenizer(row.prompt, verbose=False)["input_ids"])
    # Some tokenizers end every text, and the answer comes after this one.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if len(ids) <= most:
        return ids
    head = 0
    if row.instruction:
        # At most half of the room, so that a long instruction leaves some of the end.
        head = min(len(tokenizer(row.instruction, verbose=False)["input_ids"]), most // 2)
    return ids[:head] + ids[len(ids) - (most - head) :]


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Tokenise an answer as it follows a prompt, without the token that ends it."""
    # A word after a space is another token than at the beginning of a text.
    return list(tokenizer(f" {answer}", add_special_tokens=False, verbose=False)["input_ids"])


def encoder_ids(tokenizer: Any, row: TaskRow, most: int) -> list[int]:
    """Tokenise a prompt of at most `most` tokens for an encoder, which reads the end of a text."""
    return [*prompt_ids(tokenizer, row, most - 1), tokenizer.eos_token_id]


def encode(tokenizer: Any, row: TaskRow, most: int, *, encoder_decoder: bool = False) -> dict[str, list[int]]:
    """Make a training row of at most `most` tokens: prompt, answer, end of text. Only the last two have labels.

    Of an `encoder_decoder`, prompt and answer have at most `most` tokens each, and the answer is the labels.
    """
    if encoder_decoder:
        ids = encoder_ids(tokenizer, row, most)
        labels = [*answer_ids(tokenizer, row.output), tokenizer.eos_token_id][:most]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    answer = [*answer_ids(tokenizer, row.output), tokenizer.eos_token_id][:most]
    prompt = prompt_ids(tokenizer, row, most - len(answer))
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}
