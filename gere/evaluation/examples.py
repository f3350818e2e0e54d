"""The loss of a model on the answers of a task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gere.errors import ConfigError
from gere.evaluation.choices import Row, first_token, log_likelihoods
from gere.evaluation.general import row_values
from gere.model.batching import batches_by_length
from gere.model.forward import evaluating
from gere.ranks import ALONE, Ranks
from gere.replay.records import Record, blank, read_records, take
from gere.replay.rows import private_copy, prompt_ids

SHAPE = "a record with output, and instruction, input or both"


class TaskRow(NamedTuple):
    """One question of a task.

    Attributes:
        instruction: The question, usually the same in all rows of a task; empty if there is none.
        input: The text that it is about; empty if there is none.
        output: The right answer.
    """

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """Text that the model reads before its answer."""
        return self.instruction + self.input


class Example(NamedTuple):
    """A row of a task: what the model reads, and what it should write."""

    prompt: str
    output: str


def read_task_rows(path: Path, setting: str) -> list[TaskRow]:
    """Read records with `output`, and `instruction`, `input` or both; a number is read as its text.

    Messages name the `setting` that names the file.

    Raises:
        ConfigError: If the file cannot be read, has no rows, or a row lacks a field.
    """
    rows = take(read_records(path, ConfigError, setting), _task_row, error=ConfigError, expected=SHAPE)
    if not rows:
        raise ConfigError(
            "A file of task rows is empty.",
            where=f"{setting}, {path}",
            expected=f"rows, each {SHAPE}",
            found="no rows",
            fix="Correct the path or the file.",
        )
    return rows


def read_examples(path: Path) -> list[Example]:
    """Read task rows as `read_task_rows` does, with instruction and input joined as they stand."""
    return [Example(row.prompt, row.output) for row in read_task_rows(path, "--task-file")]


def example_losses(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int = 512,
    batch_tokens: int = 4096,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Compute the mean loss of the output tokens of each row, the token that ends the text among them.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer; unchanged.
        examples: Rows, at least one. A space goes between prompt and output unless there is white space.
        max_length: Tokens of a row that are read. A longer prompt loses its beginning.
        batch_tokens: Padded tokens of one forward pass.
        ranks: The processes that share the work; each must call this and gets the same result.

    Returns:
        Cross-entropy in nats a token of each row.

    Raises:
        TokenizerError: If a prompt is empty and the tokenizer has neither BOS nor EOS.
    """
    private = private_copy(tokenizer)
    rows = [_encode(private, example, max_length) for example in examples]
    batches = list(batches_by_length([row.ids for row in rows], batch_tokens))
    with evaluating(model):
        found = row_values(partial(log_likelihoods, model), rows, batches, ranks)
    return [-value / (len(row.ids) - row.start) for row, value in zip(rows, found, strict=True)]


def _task_row(record: Record) -> TaskRow | None:
    if not isinstance(record.value, dict):
        if blank(record.value):
            return None
        raise ValueError(f"a value of type {type(record.value).__name__}, which is no record")
    fields = {name: record.value.get(name) for name in TaskRow._fields}
    if blank(record.value) or (blank(fields) and not fields.keys().isdisjoint(record.value)):
        return None
    for names in (("instruction", "input"), ("output",)):
        values = [fields[name] for name in names]
        if all(value is None or value == "" for value in values):
            raise ValueError(f"{' or '.join(names)} is missing, null or empty")
        strange = [name for name in names if not isinstance(fields[name], str | int | float | None)]
        if strange:
            raise ValueError(f"{strange[0]} is of type {type(fields[strange[0]]).__name__}")
    # `str(None)` would make the word "None" of it.
    return TaskRow(*("" if value is None else str(value) for value in fields.values()))


def _encode(tokenizer: Any, example: Example, most: int) -> Row:
    prompt, output = example
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        ids = [first_token(tokenizer)]
    if not prompt[-1:].isspace() and not output[:1].isspace():
        output = f" {output}"
    answer = list(tokenizer(output, add_special_tokens=False, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    answer = answer[: most - 1]
    ids = ids[-(most - len(answer)) :]
    return Row(ids + answer, len(ids))
