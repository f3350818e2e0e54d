"""How well a model still reads general text: the cheapest honest measure of forgetting."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gere.cache.plan import batches_by_length
from gere.collator import pad_rows
from gere.errors import ReplaySetError
from gere.losses import next_token_ce


def general_loss(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512, batch_tokens: int = 4096
) -> float:
    """Mean next-token loss on texts, each token counting the same.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer; unchanged.
        texts: General texts that are in no training or replay set.
        max_length: Tokens of a text that are read.
        batch_tokens: Padded tokens of one forward pass.

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
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    try:
        with torch.no_grad():
            for batch in batches_by_length(rows, batch_tokens):
                part = {name: values.to(device) for name, values in pad_rows([rows[row] for row in batch], 0).items()}
                ce = next_token_ce(model(**part, use_cache=False).logits, part["input_ids"], part["attention_mask"])
                predicted = part["attention_mask"].sum(dim=1) - 1
                total += float((ce * predicted).cpu().double().sum())
    finally:
        model.train(training)
    return total / sum(len(row) - 1 for row in rows)
