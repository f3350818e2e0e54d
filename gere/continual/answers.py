"""Answers of a model, decoded greedily or chosen by likelihood, and how many are right, wrong, or no answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from gere.evaluation.choices import Row, log_likelihoods
from gere.model.adapters import base_module
from gere.model.batching import batches_by_length
from gere.model.forward import evaluating


class Scores(NamedTuple):
    """Shares of the rows of a task.

    Attributes:
        accuracy: Answers that are the right one.
        invalid: Answers that are none of the task's labels; they are wrong, too.
    """

    accuracy: float
    invalid: float


def normalised(answer: str) -> str:
    """An answer without case, punctuation and runs of spaces.

    Example:
        >>> normalised(" Science  & Mathematics.")
        'science mathematics'
    """
    letters = "".join(" " if unicodedata.category(mark)[0] in "PS" else mark for mark in answer.casefold())
    return re.sub(r"\s+", " ", letters).strip()


def score(answers: Sequence[str], right: Sequence[str], labels: Sequence[str]) -> Scores:
    """Exact match after normalisation, and the share of answers that are no label.

    Args:
        answers: What the model answered.
        right: The right answers.
        labels: All answers that the task has.
    """
    known = {normalised(label) for label in labels}
    given = [normalised(answer) for answer in answers]
    hits = sum(answer == normalised(wanted) for answer, wanted in zip(given, right, strict=True))
    return Scores(hits / len(given), sum(answer not in known for answer in given) / len(given))


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, *, batch: int = 16
) -> list[str]:
    """First line of what the model goes on with, always by the likeliest token.

    Args:
        model: A causal language model; its mode and generation settings are restored.
        tokenizer: Its tokenizer; unchanged.
        prompts: Tokens of each prompt, one or more.
        most: Largest number of new tokens.
        batch: Prompts that are decoded at a time, padded on the left.

    Returns:
        An answer for each prompt.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            texts = _decode(model, tokenizer, [list(prompts[row]) for row in rows], most)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
    return answers


class _AtLineEnd(StoppingCriteria):
    """Ends each row by itself as soon as its answer has a line break."""

    def __init__(self, tokenizer: Any, width: int) -> None:
        self._tokenizer = tokenizer
        self._width = width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows are at their end, bool [b]."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._width :])
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


def _decode(model: Any, tokenizer: Any, prompts: Sequence[list[int]], most: int) -> list[str]:
    width = max(map(len, prompts))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=most, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, use_cache=True
    )
    causal: Any = base_module(model)
    kept, causal.generation_config = causal.generation_config, settings  # what the call leaves open comes from there
    device = model.get_input_embeddings().weight.device
    try:
        rows: Tensor = causal.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_AtLineEnd(tokenizer, width)]),
        )
    finally:
        causal.generation_config = kept
    return [_first_line(tokenizer, row) for row in rows[:, width:].tolist()]


def _first_line(tokenizer: Any, row: list[int]) -> str:
    end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
    return tokenizer.decode(row[:end], skip_special_tokens=True).split("\n")[0].strip()


def likeliest_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 2048,
) -> list[int]:
    """Index of the option with the greatest mean log-likelihood of its tokens; the first of equal ones.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt, one or more.
        options: Tokens of each option, the same options for all prompts.
        batch_tokens: Padded tokens of one forward pass.
    """
    rows = [Row([*prompt, *option], len(prompt)) for prompt in prompts for option in options]
    values = [0.0] * len(rows)
    with evaluating(model):
        for batch in batches_by_length([row.ids for row in rows], batch_tokens):
            for place, found in zip(batch, log_likelihoods(model, [rows[place] for place in batch]), strict=True):
                values[place] = found / (len(rows[place].ids) - rows[place].start)
    width = len(options)
    return [max(range(width), key=lambda option: values[start + option]) for start in range(0, len(rows), width)]
