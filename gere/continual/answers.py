"""Answers of a model: decoded greedily or chosen by likelihood, and their scores."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria

from gere.evaluation.choices import Row, log_likelihoods
from gere.model.batching import batches_by_length
from gere.model.forward import evaluating
from gere.model.generate import generate


class Scores(NamedTuple):
    """Shares of the rows of a task.

    Attributes:
        accuracy: Right answers.
        invalid: Answers that are none of the task's labels. They count as wrong, too.
    """

    accuracy: float
    invalid: float


def normalised(answer: str) -> str:
    """Drop case, punctuation and runs of spaces from an answer.

    Example:
        >>> normalised(" Science  & Mathematics.")
        'science mathematics'
    """
    letters = "".join(" " if unicodedata.category(mark)[0] in "PS" else mark for mark in answer.casefold())
    return re.sub(r"\s+", " ", letters).strip()


def score(answers: Sequence[str], right: Sequence[str], labels: Sequence[str]) -> Scores:
    """Compare answers with the right ones, both normalised.

    Args:
        answers: Answers of the model, at least one.
        right: Right answers, in the same order.
        labels: All answers that the task knows.
    """
    known = {normalised(label) for label in labels}
    given = [normalised(answer) for answer in answers]
    hits = sum(answer == normalised(wanted) for answer, wanted in zip(given, right, strict=True))
    return Scores(hits / len(given), sum(answer not in known for answer in given) / len(given))


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, *, batch: int = 16
) -> list[str]:
    """Decode an answer to each prompt by the likeliest token each time, up to the first line break.

    Args:
        model: A causal language model; its mode and generation settings are restored.
        tokenizer: Its tokenizer; unchanged.
        prompts: Token ids of each prompt, at least one.
        most: Largest number of new tokens.
        batch: Prompts that are decoded at a time.

    Returns:
        An answer for each prompt.
    """
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
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
                # Not every tokenizer takes its end of text for a special token, which decoding would skip.
                ended = ids[-1:] == [eos]
                text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
                answers[row] = text.split("\n")[0].strip()
    return answers


# `stop_strings=["\n"]` of transformers does the same, but reads the vocabulary in each call of `generate`. With 32,000
# tokens that takes 180 ms, longer than a batch of short answers.
class _LineEnd(StoppingCriteria):
    """Ends each row at its first line break."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Tell which rows end, bool [b]. A line break is one byte, so one token holds it."""
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
    values = [0.0] * len(rows)
    with evaluating(model):
        for batch in batches_by_length([row.ids for row in rows], batch_tokens):
            for place, found in zip(batch, log_likelihoods(model, [rows[place] for place in batch]), strict=True):
                values[place] = found / (len(rows[place].ids) - rows[place].start)
    by_prompt = [values[start : start + len(options)] for start in range(0, len(rows), len(options))]
    return [scores.index(max(scores)) for scores in by_prompt]
