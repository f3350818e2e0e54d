"""Temperature and top-p of a sampling, exact, without sorting a whole vocabulary at each token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

CANDIDATES = 512


class Nucleus(LogitsProcessor):
    """Leaves the likeliest tokens that together hold a share of the probability, at least one.

    The same tokens as transformers' temperature and top-p, but for rounding. Those sort the whole vocabulary, which
    takes most of the time of a small model on a CPU; here only the likeliest tokens are sorted, unless these hold too
    little.

    Args:
        temperature: What the logits are divided by.
        top_p: The share, 1 for all tokens.
    """

    def __init__(self, temperature: float, top_p: float) -> None:
        self._temperature = temperature
        self._top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [b, vocabulary], minus infinity for what is left out."""
        scores = scores / self._temperature
        if self._top_p >= 1:
            return scores
        total = scores.logsumexp(dim=-1, keepdim=True)
        for count in (min(CANDIDATES, scores.shape[-1]), scores.shape[-1]):
            values, places = scores.topk(count)
            before = (values - total).exp().cumsum(dim=-1).roll(1, dims=-1)
            whole = bool((before[:, 0] >= self._top_p).all())  # the last sum, rolled to the front
            before[:, 0] = 0.0
            if whole or count == scores.shape[-1]:
                break
        kept = values.masked_fill(before >= self._top_p, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter_(-1, places, kept)
