"""Answers of a model: decoded greedily or chosen by likelihood, and their scores."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria

from gere.config import require
from gere.evaluation.choices import Row, log_likelihoods
from gere.evaluation.general import row_values
from gere.model.batching import batches_by_length
from gere.model.forward import evaluating
from gere.model.generate import generate
from gere.ranks import ALONE


class Scores(NamedTuple):
    """Shares of the rows of a task.

    Attributes:
        accuracy: Right answers.
        invalid: Answers that match no label of the task. They count as wrong, too.
    """

    accuracy: float
    invalid: float


# Marks that end a sentence or stand around a word, and mean nothing there. Signs, units and operators are not among
# them: -5, 5 %, C#, .5 and 5! are no 5 and no C. Brackets around a number are a sign in accounts.
END = ".,;:\u3002\u3001"
AFTER_A_WORD = re.compile(r"(?<=[^\W\d_]{2})[!?]+$")
PAIRS = {'""', "''", "``", "**", "\u201c\u201d", "\u2018\u2019", "\u201e\u201c", "\u00ab\u00bb", "\u300c\u300d"}
# Characters whose plain form has another meaning: 3\u00b2 is no 32.
RAISED = ("<super>", "<sub>", "<fraction>")


def readings(text: str) -> list[str]:
    """Return a text as it is read ever more loosely, each by what the one before leaves.

    First the text itself, but for space around it and for the form of its Unicode characters (NFC). Then without
    compatibility forms and runs of spaces, then without case, then without marks around it.

    Example:
        >>> readings(" Good  news.")
        ['Good  news.', 'Good news.', 'good news.', 'good news']
    """
    exact = unicodedata.normalize("NFC", text).strip()
    plain = _plain(exact)
    folded = plain
    for _ in range(2):  # twice, as Unicode defines it: what a character folds to can be one that folds again
        folded = _plain(unicodedata.normalize("NFD", folded).casefold())
    return [exact, plain, folded, _bare(folded)]


def _plain(text: str) -> str:
    """Replace compatibility forms, such as full-width digits, and runs of spaces."""
    parts = []
    for mark in unicodedata.normalize("NFC", text):
        raised = unicodedata.decomposition(mark).startswith(RAISED)
        parts.append(mark if raised else unicodedata.normalize("NFKC", mark))
    return " ".join(unicodedata.normalize("NFC", "".join(parts)).split())


def _bare(text: str) -> str:
    """Drop marks at the end and around a text until none is left."""
    while True:
        inner = AFTER_A_WORD.sub("", text.rstrip(END)).rstrip()
        around = inner[:1] + inner[-1:]
        if len(inner) > 2 and (around in PAIRS or (around == "()" and inner[1:-1].isalpha())):
            inner = inner[1:-1].strip()
        if inner == text:
            return text
        text = inner


def normalised(answer: str) -> str:
    """Return the loosest of the readings of an answer.

    Example:
        >>> normalised(" Science  & Mathematics.")
        'science & mathematics'
        >>> normalised("-5."), normalised("C++")
        ('-5', 'c++')
    """
    return readings(answer)[-1]


class Labels:
    """Labels of a task, and which one an answer stands for.

    An answer stands for the label that it is; else for the only one that it is but for spaces and compatibility forms;
    else for the only one that it is but for these and case; else but for marks around it, too. So two labels are never
    taken for one, however alike they are.

    Args:
        labels: The labels. Of those that differ in space around them alone, or in the Unicode form of their
            characters, the first counts.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self._by_reading: list[dict[str, set[str]]] = []
        self._first: dict[str, str] = {}
        for label in labels:
            read = readings(label)
            self._first.setdefault(read[0], label)
            for place, reading in enumerate(read):
                if place == len(self._by_reading):
                    self._by_reading.append({})
                # Nothing is left of a label of marks alone, and an empty answer stands for none.
                if reading:
                    self._by_reading[place].setdefault(reading, set()).add(read[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._first.values())

    def find(self, answer: str) -> str | None:
        """Return the label that an answer stands for; `None` if it stands for none, or for more than one."""
        for known, reading in zip(self._by_reading, readings(answer), strict=False):
            if reading in known:
                found = known[reading]
                return self._first[min(found)] if len(found) == 1 else None
        return None

    def alike(self) -> list[list[str]]:
        """Return groups of labels that differ in case, space or marks alone, each in its own order."""
        groups = [known for known in self._by_reading[-1].values() if len(known) > 1] if self._by_reading else []
        return [[self._first[label] for label in sorted(group)] for group in groups]


def score(answers: Sequence[str | None], right: Sequence[str], labels: Iterable[str]) -> Scores:
    """Compare answers with the right ones, by the labels that they stand for.

    Args:
        answers: Answers of the model, at least one; `None` where it gave none.
        right: Right answers, in the same order.
        labels: All answers that the task knows.

    Raises:
        ConfigError: If a right answer is none of the labels, so that no answer could be right.
    """
    known = Labels(labels)
    hits = invalid = 0
    for answer, wanted in zip(answers, right, strict=True):
        expected = known.find(wanted)
        require(expected is not None, "right", f"one of {', '.join(known)}", wanted)
        given = None if answer is None else known.find(answer)
        hits += given == expected
        invalid += given is None
    return Scores(hits / len(answers), invalid / len(answers))


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, *, batch: int = 16, lines: int = 1
) -> list[str]:
    """Decode an answer to each prompt greedily, up to the end of its last line.

    Args:
        model: A causal language model; its mode and generation settings are restored.
        tokenizer: Its tokenizer; unchanged.
        prompts: Token ids of each prompt, at least one.
        most: Largest number of new tokens.
        batch: Prompts to decode at a time.
        lines: Lines that an answer may have; those of the longest label.

    Returns:
        An answer for each prompt.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if pad is None:
        pad = eos
    # Prompts of like length in a batch need little padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            found = generate(
                model,
                [prompts[row] for row in rows],
                pad_id=pad,
                max_new_tokens=most,
                stops={eos},
                criteria=[_LineEnd(tokenizer, lines)],
            )
            for row, ids in zip(rows, found, strict=True):
                # `skip_special_tokens` does not drop an end of text that is an ordinary token of the vocabulary.
                if ids[-1:] == [eos]:
                    ids = ids[:-1]
                answers[row] = "\n".join(text_of(tokenizer, ids).split("\n")[:lines]).strip()
    return answers


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of an answer."""
    # Some tokenizers would take the spaces before marks away, and "a . b" be another text than the label.
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


# `stop_strings=["\n"]` of transformers does the same, but reads the vocabulary in each call of `generate`. With 32,000
# tokens that takes 180 ms, longer than a batch of short answers.
class _LineEnd(StoppingCriteria):
    """End each row at its last line break."""

    def __init__(self, tokenizer: Any, lines: int) -> None:
        self._tokenizer = tokenizer
        self._left: list[int] = []
        self._lines = lines

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return which rows end, bool [b]."""
        # A line break is one byte, so one token holds it, and the last token is enough to look at.
        texts = self._tokenizer.batch_decode(input_ids[:, -1:])
        left = self._left or [self._lines] * len(texts)
        self._left = [count - text.count("\n") for count, text in zip(left, texts, strict=True)]
        return torch.tensor([count < 1 for count in self._left], device=input_ids.device)


def likeliest_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 2048,
) -> list[int | None]:
    """Choose the option with the greatest mean log-likelihood of its tokens.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, at least one.
        options: Token ids of each option, the same options for all prompts.
        batch_tokens: Padded tokens of one forward pass.

    Returns:
        Index of the chosen option of each prompt, the first of equal ones; `None` where a likelihood is NaN.
    """
    rows = [Row([*prompt, *option], len(prompt)) for prompt in prompts for option in options]
    batches = list(batches_by_length([row.ids for row in rows], batch_tokens))
    with evaluating(model):
        sums = row_values(partial(log_likelihoods, model), rows, batches, ALONE)
    # The mean: a sum would favour the shorter label.
    means = [value / (len(row.ids) - row.start) for row, value in zip(rows, sums, strict=True)]
    size = len(options)
    return [_likeliest(means[start : start + size]) for start in range(0, len(means), size)]


def _likeliest(means: Sequence[float]) -> int | None:
    # `max` of values with NaN depends on their order: a broken model would seem to choose the first option.
    if any(map(math.isnan, means)):
        return None
    return means.index(max(means))
