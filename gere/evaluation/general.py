"""How well a model still reads general text: the cheapest honest measure of forgetting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from gere.errors import ReplaySetError
from gere.losses.cross_entropy import next_token_ce
from gere.model.batching import batches_by_length, pad_rows
from gere.model.forward import evaluating
from gere.ranks import ALONE, Ranks
from gere.replay.rows import private_copy

R = TypeVar("R")


def general_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_tokens: int = 4096,
    ranks: Ranks = ALONE,
) -> float:
    """Compute the mean next-token loss on texts, each token counting the same.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer; unchanged.
        texts: General texts that are in no training or replay set.
        max_length: Tokens of a text that are read.
        batch_tokens: Padded tokens of one forward pass.
        ranks: The processes that share the work; each must call this and gets the same result.

    Returns:
        Cross-entropy in nats a token.

    Raises:
        ReplaySetError: If no text has two tokens.
    """
    usable: list[str] = []
    found = "one string"
    if not isinstance(texts, str):  # a string is a sequence too, and each of its letters would count as a text
        usable = list(texts)
        found = f"{len(usable)} texts, none of two tokens"
    rows: list[list[int]] = []
    if usable:  # tokenizers fail on an empty list
        encoded = private_copy(tokenizer)(usable, verbose=False)["input_ids"]
        rows = [list(ids)[:max_length] for ids in encoded]
    rows = [row for row in rows if len(row) > 1]  # the first token of a row is not predicted
    if not rows:
        raise ReplaySetError(
            "There is no general text to evaluate on.",
            where="texts",
            expected="a list of texts, at least one of two tokens",
            found=found,
            fix="Give held-out general texts.",
        )
    losses = row_values(_loss_sums, model, rows, list(batches_by_length(rows, batch_tokens)), ranks)
    return sum(losses) / sum(len(row) - 1 for row in rows)


def row_values(
    measure: Callable[[nn.Module, list[R]], list[float]],
    model: nn.Module,
    rows: Sequence[R],
    batches: Sequence[list[int]],
    ranks: Ranks,
) -> list[float]:
    """Measure rows, the same on every process, in batches of their indices that the processes share.

    `measure` calls the model once, in evaluation mode and without gradients, and gives a value for each of its rows.
    """

    def own() -> dict[int, float]:
        found: dict[int, float] = {}
        for batch in ranks.share(batches):
            found.update(zip(batch, measure(model, [rows[row] for row in batch]), strict=True))
        return found

    found: dict[int, float] = {}
    with evaluating(model):
        for part in ranks.ask(own):
            found |= part
    # In the order of the rows, so that a sum does not depend on the number of processes.
    return [found[row] for row in range(len(rows))]


def _loss_sums(model: nn.Module, rows: list[list[int]]) -> list[float]:
    """Return the loss of each row, summed over its tokens."""
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in pad_rows(rows, 0).items()}
    ce = next_token_ce(model(**batch, use_cache=False).logits, batch["input_ids"], batch["attention_mask"])
    # Sums, since a mean of the means of rows would not count each token the same.
    return (ce * (batch["attention_mask"].sum(dim=1) - 1)).cpu().double().tolist()
