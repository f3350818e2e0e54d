"""The loss of a model on the answers of a task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gere._files import numbered_lines
from gere.errors import ConfigError
from gere.evaluation.choices import Row, first_token, log_likelihoods
from gere.evaluation.general import row_values
from gere.model.batching import batches_by_length
from gere.model.forward import evaluating
from gere.ranks import ALONE, Ranks
from gere.replay.rows import private_copy


class Example(NamedTuple):
    """A row of a task: what the model reads, and what it should write."""

    prompt: str
    output: str


def read_examples(path: Path) -> list[Example]:
    """Read JSON lines with `output`, and `instruction`, `input` or both, which are joined as they stand.

    Raises:
        ConfigError: If the file cannot be read, is empty, or a row lacks a field.
    """
    try:
        examples = [_example(record, line) for line, record in numbered_lines(path)]
        if not examples:
            raise ValueError("no rows")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "A file of task rows cannot be read.",
            where=path,
            expected="JSON lines with the texts output, and instruction or input",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the path or the file.",
        ) from error
    return examples


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


def _example(record: Any, line: int) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"line {line} of the file: a JSON {type(record).__name__}, which is no record")
    parts = [record[name] for name in ("instruction", "input") if record.get(name) is not None]
    output = record.get("output")
    for name, texts in (("instruction or input", parts), ("output", [output])):
        if not all(isinstance(text, str) for text in texts) or not any(texts):
            raise ValueError(f"line {line} of the file: {name} is missing, empty or no text")
    return Example("".join(parts), str(output))


def _encode(tokenizer: Any, example: Example, most: int) -> Row:
    prompt, output = example
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    # Some tokenizers end every text, and the output comes after this one.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
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
