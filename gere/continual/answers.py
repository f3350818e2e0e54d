"""Answers of a model: decoded greedily or chosen by likelihood, and their scores."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria

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


def normalised(answer: str) -> str:
    """Drop case, punctuation and runs of spaces from an answer.

    Example:
        >>> normalised(" Science  & Mathematics.")
        'science mathematics'
    """
    marks = list(answer.casefold())
    for place, mark in enumerate(marks):
        if unicodedata.category(mark)[0] in "PS":  # punctuation and symbols
            marks[place] = " "
    return " ".join("".join(marks).split())


def score(answers: Sequence[str], right: Sequence[str], labels: Sequence[str]) -> Scores:
    """Compare answers with the right ones, both normalised.

    Args:
        answers: Answers of the model, at least one.
        right: Right answers, in the same order.
        labels: All answers that the task knows.
    """
    known = {normalised(label) for label in labels}
    hits = invalid = 0
    for answer, wanted in zip(answers, right, strict=True):
        given = normalised(answer)
        hits += given == normalised(wanted)
        invalid += given not in known
    return Scores(hits / len(answers), invalid / len(answers))


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, *, batch: int = 16
) -> list[str]:
    """Decode an answer to each prompt greedily, up to the first line break.

    Args:
        model: A causal language model; its mode and generation settings are restored.
        tokenizer: Its tokenizer; unchanged.
        prompts: Token ids of each prompt, at least one.
        most: Largest number of new tokens.
        batch: Prompts to decode at a time.

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
                criteria=[_LineEnd(tokenizer)],
            )
            for row, ids in zip(rows, found, strict=True):
                # `skip_special_tokens` does not drop an end of text that is an ordinary token of the vocabulary.
                if ids[-1:] == [eos]:
                    ids = ids[:-1]
                text = tokenizer.decode(ids, skip_special_tokens=True)
                answers[row] = text.split("\n")[0].strip()
    return answers


# `stop_strings=["\n"]` of transformers does the same, but reads the vocabulary in each call of `generate`. With 32,000
# tokens that takes 180 ms, longer than a batch of short answers.
class _LineEnd(StoppingCriteria):
    """End each row at its first line break."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return which rows end, bool [b]."""
        # A line break is one byte, so one token holds it, and the last token is enough to look at.
        texts = self._tokenizer.batch_decode(input_ids[:, -1:])
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


def likeliest_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 2048,
) -> list[int]:
    """Choose the option with the greatest mean log-likelihood of its tokens.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, at least one.
        options: Token ids of each option, the same options for all prompts.
        batch_tokens: Padded tokens of one forward pass.

    Returns:
        Index of the chosen option of each prompt, the first of equal ones.
    """
    rows = [Row([*prompt, *option], len(prompt)) for prompt in prompts for option in options]
    batches = list(batches_by_length([row.ids for row in rows], batch_tokens))
    with evaluating(model):
        sums = row_values(partial(log_likelihoods, model), rows, batches, ALONE)
    # The mean: a sum would favour the shorter label.
    means = [value / (len(row.ids) - row.start) for row, value in zip(rows, sums, strict=True)]
    size = len(options)
    return [max(range(size), key=means[start : start + size].__getitem__) for start in range(0, len(means), size)]
