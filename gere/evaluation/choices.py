"""Multiple-choice accuracy by the log-likelihood of each option after its context."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional as F

from gere.config import require
from gere.errors import QuestionError, TokenizerError
from gere.evaluation.general import row_values
from gere.evaluation.questions import Question
from gere.model.batching import pad_rows
from gere.model.forward import evaluating
from gere.ranks import ALONE, Ranks
from gere.replay.rows import one_bos, private_copy

ChoiceNormalization = Literal["characters", "tokens", "none"]
CHUNK_TOKENS = 256


class ChoiceScore(NamedTuple):
    """Result of a multiple-choice task.

    Attributes:
        accuracy: Share of questions whose right option scores highest.
        standard_error: `sqrt(accuracy (1 - accuracy) / rows)`.
        rows: Number of questions.
    """

    accuracy: float
    standard_error: float
    rows: int

    @classmethod
    def of(cls, right: float, rows: int) -> ChoiceScore:
        """Return the score of so many right answers."""
        share = right / rows
        return cls(share, math.sqrt(share * (1 - share) / rows), rows)


class Row(NamedTuple):
    """Token ids of a context with one of its options, which begins at index `start`, at least 1."""

    ids: list[int]
    start: int


def choice_accuracy(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    normalization: ChoiceNormalization = "characters",
    batch_size: int = 16,
    max_length: int = 1024,
    ranks: Ranks = ALONE,
) -> ChoiceScore:
    """Compute the share of questions for which the right option is the likeliest.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer; unchanged.
        questions: The questions.
        normalization: Divisor of the log-likelihood of an option: its characters without the space before it
            (`acc_norm` of lm-evaluation-harness), its tokens, or nothing (`acc`).
        batch_size: Options of one forward pass.
        max_length: Tokens of context and option that are read; a longer context loses its beginning.
        ranks: The processes that share the work; each must call this and gets the same result.

    Returns:
        Accuracy with its standard error. Of options that score the same the first counts. Where a score is NaN, the
        question counts as wrong.

    Raises:
        ConfigError: If an argument cannot be used.
        QuestionError: If there is no question.
        TokenizerError: If a context is empty and the tokenizer has neither BOS nor EOS.
    """
    scores = option_scores(
        model,
        tokenizer,
        questions,
        normalization=normalization,
        batch_size=batch_size,
        max_length=max_length,
        ranks=ranks,
    )
    right = sum(_is_right(row, question.answer) for row, question in zip(scores, questions, strict=True))
    return ChoiceScore.of(right, len(questions))


def option_scores(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    normalization: ChoiceNormalization = "characters",
    batch_size: int = 16,
    max_length: int = 1024,
    ranks: Ranks = ALONE,
) -> list[list[float]]:
    """Compute the normalised log-likelihood of each option, in nats; arguments and errors as `choice_accuracy`."""
    require_normalization(normalization)
    require_sizes(batch_size, max_length)
    if not questions:
        raise QuestionError("There are no questions.", where="questions", expected="at least one", found="none")
    rows = encode(tokenizer, questions, max_length)
    # The longest first: if a batch does not fit into memory, it is the first one.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with evaluating(model):
        found = zip(rows, row_values(partial(log_likelihoods, model), rows, batches, ranks), strict=True)
    scores = []
    for question in questions:
        # Options first: at their end `zip` must not have taken the row of the next question.
        own = zip(question.options, found, strict=False)
        scores.append([value / _length(row, option, normalization) for option, (row, value) in own])
    return scores


def require_normalization(rule: object) -> None:
    """Refuse what a log-likelihood cannot be divided by."""
    names = get_args(ChoiceNormalization)
    require(rule in names, "normalization", " or ".join(map(repr, names)), rule)


def require_sizes(batch_size: object, max_length: object) -> None:
    """Refuse batches without a row and rows without a context."""
    require(type(batch_size) is int and batch_size > 0, "batch_size", "a number above 0", batch_size)
    require(type(max_length) is int and max_length > 1, "max_length", "a number above 1", max_length)


def encode(tokenizer: Any, questions: Sequence[Question], max_length: int) -> list[Row]:
    """Tokenise each context together with each of its options, question by question.

    A space stands between them unless one is there. The option begins at the first token that the context alone does
    not have: a token that spans the border belongs to the option. The last `max_length` tokens are kept.
    """
    private = private_copy(tokenizer)
    contexts, texts = [], []
    for question in questions:
        for context, option in zip(question.contexts, question.options, strict=True):
            contexts.append(context)
            texts.append(_joined(context, option))
    once = list(dict.fromkeys(contexts))  # the options of a question share its context
    alone = dict(zip(once, _ids(private, once), strict=True))
    together = _ids(private, texts)
    return [_row(tokenizer, alone[context], ids, max_length) for context, ids in zip(contexts, together, strict=True)]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [one_bos(ids, tokenizer) for ids in tokenizer(texts, verbose=False)["input_ids"]]


def _joined(context: str, option: str) -> str:
    if not context or context[-1].isspace() or option[:1].isspace():
        return context + option
    return f"{context} {option}"


def _row(tokenizer: Any, context: Sequence[int], ids: Sequence[int], max_length: int) -> Row:
    ids = list(ids)
    start = 0
    while start < min(len(ids), len(context)) and ids[start] == context[start]:
        start += 1
    if start == 0:
        # The model predicts a token from the one before it, so the option needs one.
        ids, start = [first_token(tokenizer), *ids], 1
    cut = max(0, len(ids) - max_length)
    # One token stays on each side of the border, however long the option is, and if it has no token of its own.
    return Row(ids[cut:], min(max(1, start - cut), len(ids) - cut - 1))


def first_token(tokenizer: Any) -> int:
    """Return the token that may stand before a text: BOS, else EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise TokenizerError(
        "A question has no context, and there is no token that its options could follow.",
        where="tokenizer",
        expected="a bos_token or an eos_token",
        found="neither",
        fix="Give the question a context, or set tokenizer.bos_token.",
    )


def _is_right(scores: Sequence[float], answer: int) -> bool:
    # `max` of values with NaN depends on their order.
    return not any(map(math.isnan, scores)) and scores.index(max(scores)) == answer


def _length(row: Row, option: str, normalization: ChoiceNormalization) -> int:
    lengths = {"characters": len(option.lstrip()), "tokens": len(row.ids) - row.start, "none": 1}
    return lengths[normalization]


def log_likelihoods(model: nn.Module, rows: Sequence[Row]) -> list[float]:
    """Return the log-likelihood of the option in each row of a batch, in nats.

    The model is in evaluation mode and without gradients. Sums are in float64 over float32 values of the tokens.
    """
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in pad_rows([row.ids for row in rows], 0).items()}
    width = batch["input_ids"].shape[1]
    keep = {}
    if _keeps_logits(model):
        # Most logits are those of the contexts, which no option needs.
        keep["logits_to_keep"] = width - min(row.start for row in rows) + 1
    logits = model(**batch, use_cache=False, **keep).logits
    where = torch.tensor([(i, t) for i, row in enumerate(rows) for t in range(row.start, len(row.ids))], device=device)
    targets = batch["input_ids"][where[:, 0], where[:, 1]]
    where[:, 1] += logits.shape[1] - width - 1  # the logits of a token stand one place before it
    losses = []
    # A chunk at a time: float32 values of all tokens over the vocabulary take too much memory.
    for places, ids in zip(where.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        losses.append(F.cross_entropy(logits[places[:, 0], places[:, 1]].float(), ids, reduction="none"))
    parts = torch.cat(losses).cpu().double().split([len(row.ids) - row.start for row in rows])
    return [-float(part.sum()) for part in parts]


def _keeps_logits(model: Any) -> bool:
    """Tell whether the model can leave out the logits of the first tokens."""
    # PEFT's own `forward` takes any argument by **kwargs.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
