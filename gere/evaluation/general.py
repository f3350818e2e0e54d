"""How well a model still reads general text: the cheapest honest measure of forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

from gere import metrics
from gere.errors import ReplaySetError
from gere.losses.cross_entropy import next_token_ce
from gere.model.batching import batches_by_length, pad_rows
from gere.model.forward import evaluating
from gere.ranks import ALONE, Ranks
from gere.replay.rows import token_rows, with_two_tokens
from gere.replay.texts import Source, read_rows

R = TypeVar("R")
LOSS, CHANGE, INTERVAL = "general/loss", "general/change", "general/change_interval"


class GeneralChange(NamedTuple):
    """What became of the loss on held-out texts.

    Attributes:
        loss: Mean over the texts of their mean next-token loss, in nats.
        change: The same minus that of the base model.
        interval: Half width of the 95 % interval of the change, paired by text; NaN for a single text.
        texts: Number of texts.
    """

    loss: float
    change: float
    interval: float
    texts: int

    @property
    def logs(self) -> dict[str, float]:
        """Values by their names in the log."""
        return {LOSS: self.loss, CHANGE: self.change, INTERVAL: self.interval}


def change_of(now: Sequence[float], base: Sequence[float]) -> GeneralChange:
    """Compare the losses of texts with those of the base model on the same texts."""
    changes = metrics.interval([new - old for new, old in zip(now, base, strict=True)])
    return GeneralChange(math.fsum(now) / len(now), changes.mean, changes.half, len(now))


def general_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    max_length: int = 512,
    batch_tokens: int = 4096,
    ranks: Ranks = ALONE,
) -> float:
    """Compute the mean over texts of their mean next-token loss, in nats; arguments and errors as in `text_losses`."""
    losses = text_losses(model, tokenizer, texts, max_length=max_length, batch_tokens=batch_tokens, ranks=ranks)
    return math.fsum(losses) / len(losses)


def text_losses(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    max_length: int = 512,
    batch_tokens: int = 4096,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Compute the mean next-token loss of each text.

    Args:
        model: A causal language model; its mode is restored.
        tokenizer: Its tokenizer; unchanged.
        texts: General texts that are in no training or replay set; rows of chats or paths, too.
        max_length: Tokens of a text that are read.
        batch_tokens: Padded tokens of one forward pass.
        ranks: The processes that share the work; each must call this and gets the same result.

    Returns:
        Cross-entropy in nats of each text that has two tokens or more.

    Raises:
        ReplaySetError: If there is no text, or none that has two tokens.
    """
    if isinstance(texts, str):
        raise ReplaySetError(
            "There is no general text to evaluate on.",
            where="texts",
            expected="a list of texts, or of paths",
            found=f"one string, {texts[:80]!r}",
            fix="Put it into a list.",
        )
    # A list may hold paths, chats, or texts that a tokenizer refuses.
    read = [row.render(tokenizer) for row in read_rows(Source(texts, "texts"))]
    rows = token_rows(read, tokenizer, max_length)
    rows = [rows[place] for place in with_two_tokens(rows, "texts")]
    with evaluating(model):
        return row_values(partial(_losses, model), rows, list(batches_by_length(rows, batch_tokens)), ranks)


def row_values(
    measure: Callable[[list[R]], list[float]], rows: Sequence[R], batches: Sequence[list[int]], ranks: Ranks
) -> list[float]:
    """Measure rows, the same on every process, in batches of their indices that the processes share.

    `measure` calls the model once, and gives a value for each of its rows.
    """

    def own() -> dict[int, float]:
        found: dict[int, float] = {}
        for batch in ranks.share(batches):
            found.update(zip(batch, measure([rows[row] for row in batch]), strict=True))
        return found

    found: dict[int, float] = {}
    for part in ranks.ask(own):
        found |= part
    # In the order of the rows, so that a sum does not depend on the number of processes.
    return [found[row] for row in range(len(rows))]


def _losses(model: nn.Module, rows: list[list[int]]) -> list[float]:
    """Return the mean loss of each row."""
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in pad_rows(rows, 0).items()}
    ce = next_token_ce(model(**batch, use_cache=False).logits, batch["input_ids"], batch["attention_mask"])
    return ce.cpu().double().tolist()
