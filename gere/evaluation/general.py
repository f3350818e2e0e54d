"""How well a model still reads general text: the cheapest honest measure of forgetting."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gere.errors import ReplaySetError
from gere.losses.cross_entropy import next_token_ce
from gere.model.batching import batches_by_length, pad_rows
from gere.ranks import ALONE, Ranks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def general_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_tokens: int = 4096,
    ranks: Ranks = ALONE,
) -> float:
    """Mean next-token loss on texts, each token counting the same.

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
    usable = [] if isinstance(texts, str) else list(texts)
    encoded = copy.deepcopy(tokenizer)(usable, verbose=False)["input_ids"] if usable else []
    rows = [row for row in (list(ids)[:max_length] for ids in encoded) if len(row) > 1]
    if not rows:
        raise ReplaySetError(
            "There is no general text to evaluate on.",
            where="texts",
            expected="a list of texts, at least one of two tokens",
            found="one string" if isinstance(texts, str) else f"{len(texts)} texts, none of two tokens",
            fix="Give held-out general texts.",
        )

    def measure() -> dict[int, float]:
        found: dict[int, float] = {}
        for batch in ranks.share(list(batches_by_length(rows, batch_tokens))):
            found.update(zip(batch, _sums(model, [rows[row] for row in batch]), strict=True))
        return found

    with evaluating(model):
        found = {row: value for part in ranks.ask(measure) for row, value in part.items()}
    return sum(found[row] for row in range(len(rows))) / sum(len(row) - 1 for row in rows)


def _sums(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[float]:
    """Loss of each row, summed over its tokens."""
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in pad_rows(rows, 0).items()}
    ce = next_token_ce(model(**batch, use_cache=False).logits, batch["input_ids"], batch["attention_mask"])
    return (ce * (batch["attention_mask"].sum(dim=1) - 1)).cpu().double().tolist()
