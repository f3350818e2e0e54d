"""Multiple-choice questions from files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gere.cache.heldout import spread as evenly
from gere.config import require
from gere.errors import QuestionError
from gere.replay.records import Record, blank, read_records, take

T = TypeVar("T")
SHAPE = '{"query": str or a list with one for each choice, "choices": [str, ...], "gold": int}; or "question": str'


@dataclass(frozen=True)
class Question:
    r"""A question with its options.

    Attributes:
        context: Text before each option, such as `"Question: ...\nAnswer:"`; or a tuple with one text for each option,
            for tasks that put the same ending after several beginnings.
        options: The answers to choose from, without a space before them.
        answer: Index of the right one.

    Raises:
        QuestionError: If there are fewer than two options, an empty one, or no right one.
    """

    context: str | tuple[str, ...]
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        usable = (
            _are_texts(self.options)
            and len(self.options) > 1
            and all(option.strip() for option in self.options)
            and (isinstance(self.context, str) or _are_texts(self.context))
            and len(self.contexts) == len(self.options)
            and type(self.answer) is int  # `isinstance` would take True for the index 1
            and 0 <= self.answer < len(self.options)
        )
        if not usable:
            raise QuestionError(
                "A multiple-choice question cannot be used.",
                where="Question",
                expected="a context or one for each option, two or more options with text, the index of the right one",
                found=f"{self.options!r}, answer {self.answer!r}",
                fix="Correct or drop the question.",
            )

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context of each option."""
        if isinstance(self.context, str):
            return (self.context,) * len(self.options)
        return self.context


def read_questions(source: str | Path, limit: int | None = None) -> list[Question]:
    r"""Read the questions of a task.

    Args:
        source: A file of records `{"query", "choices", "gold"}`, such as .jsonl. A list of queries has one for each
            choice. `"question"` in place of `"query"` is read as `"Question: ...\nAnswer:"`. Other fields are ignored.
        limit: Questions to take, evenly spread over the file, since some files are sorted by subject.

    Raises:
        QuestionError: If the file cannot be read, or a question cannot be used.
    """
    path = Path(source)
    if not path.suffix and not path.is_file():
        raise QuestionError(
            "There is no such file of questions.",
            where=source,
            expected=f"a file such as .jsonl, each row {SHAPE}",
            found="no file",
            fix=f'Give a .jsonl file, or the task lm-eval:{source} after pip install "gere[lm-eval]".',
        )
    # All are read before some are taken: a damaged file is refused whatever the limit is.
    questions = take(read_records(path, QuestionError, "questions"), _question, error=QuestionError, expected=SHAPE)
    if not questions:
        raise QuestionError("There are no questions.", where=source, expected=f"rows of {SHAPE}", found="none")
    return spread(questions, limit)


def spread(items: list[T], limit: int | None) -> list[T]:
    """Take at most `limit` items, evenly spread over the list and with its first one."""
    require(limit is None or (type(limit) is int and limit > 0), "limit", "a number above 0, or None", limit)
    return evenly(items, len(items) if limit is None else limit)


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


def _question(record: Record) -> Question | None:
    if blank(record.value):
        return None
    fields: Any = record.value if isinstance(record.value, dict) else {}
    context = _tuple(fields.get("query"))
    if "query" not in fields and isinstance(fields.get("question"), str):
        context = f"Question: {fields['question'].strip()}\nAnswer:"
    try:
        return Question(context, _tuple(fields.get("choices")), fields.get("gold"))
    except QuestionError as error:
        raise ValueError(json.dumps(record.value, ensure_ascii=False, default=str)[:200]) from error


def _tuple(value: Any) -> Any:
    # A string stays one and is refused as `choices`: `tuple` would make each of its letters an option.
    return tuple(value) if isinstance(value, list) else value
