"""Logit imitation (KL): the distribution stays near the base distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gere.losses.chunks import CHUNK_TOKENS, sum_in_chunks, wide
from gere.losses.strategy import Seen, Strategy, Tensors

# Divergence of a token, in nats, by rounding alone: of a float32 sum over the likeliest tokens, and of logits
# that were computed in 16 bits.
LEAST_DIVERGENCE, LEAST_DIVERGENCE_16_BITS = 1e-6, 1e-5


class TopLogits(NamedTuple):
    """The likeliest tokens of a distribution, and the probability of all others together.

    Attributes:
        ids: Their token ids, [..., k].
        log_probs: Their log-probabilities at the temperature, [..., k].
        rest: Log of the remaining probability, [...]; the lowest number if there are no other tokens.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


def top_logits(logits: Tensor, top_k: int, temperature: float) -> TopLogits:
    """Keep the part of a distribution that `top_k_kl` needs.

    Args:
        logits: Logits, shape [..., v].
        top_k: Tokens to keep, at most v.
        temperature: Divisor of the logits.

    Returns:
        `ids` int32, `log_probs` and `rest` float32 (float64 for float64 logits).
    """
    scaled = wide(logits) / temperature
    ids = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1).indices
    log_probs, rest = _split(scaled, ids)
    return TopLogits(ids.to(torch.int32), log_probs, rest)


def top_k_kl(
    logits: Tensor,
    base: TopLogits,
    mask: Tensor,
    temperature: float = 2.0,
    tolerance: Tensor | float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Compute logit imitation (KL): the divergence of the current distribution from the base one, base || model.

    The base distribution is known on its likeliest tokens. All others count as one. Merging tokens never raises a
    divergence, so the value is a lower bound of the full one. It misses rest x KL inside the rest.

    References:
        One of the replay objectives that GeRe, arXiv 2508.04676, compares with TM. GeRe takes the full vocabulary and
        temperature 2, without the factor of the squared temperature.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `logits` | [b, t, v], float | output of the head of the current model |
        | `base` | [b, t, k] and [b, t] | likeliest tokens of the base model, from `top_logits` |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `temperature` | number | divisor of the logits, the same as for `base` |
        | `tolerance` | number | a token whose divergence is no more than this counts as 0 |

    Args:
        logits: Logits of the current model.
        base: Distribution of the base model.
        mask: Real tokens.
        temperature: Divisor of the logits.
        tolerance: Rounding noise to be ignored.
        chunk_tokens: Tokens whose logits are held in float32 at one time.

    Returns:
        Mean over the real tokens of each row, in nats, shape [b], float32 (float64 for float64 logits).

    Relations:
        Binds the output of the head; TM, L1 and L2 bind its input. `next_token_ce` looks at one token.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0]]])
        >>> top_k_kl(logits, top_logits(logits, 1, 2.0), torch.ones(1, 1)).item()
        0.0
    """
    real = mask.bool()

    def row_sums(logits: Tensor, ids: Tensor, log_probs: Tensor, rest: Tensor, real: Tensor) -> tuple[Tensor]:
        divergence = token_kl(TopLogits(ids, log_probs, rest), wide(logits) / temperature)
        # A NaN is not within the tolerance.
        return (torch.where(real & ~(divergence <= tolerance), divergence, 0.0).sum(dim=1),)

    (total,) = sum_in_chunks(row_sums, (logits, *base, real), chunk_tokens)
    return total / real.sum(dim=1).clamp(min=1)


def token_kl(base: TopLogits, scaled: Tensor) -> Tensor:
    """Compute the divergence of each token, shape [...], from logits divided by the temperature, [..., v]."""
    log_q, rest_q = _split(scaled, base.ids.long())
    log_p, rest_p = base.log_probs.to(log_q), base.rest.to(log_q)
    kept = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kept + rest_p.exp() * (rest_p - rest_q)


def _split(scaled: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of `ids`, and the log of the probability of all other tokens together."""
    norm = scaled.logsumexp(dim=-1)
    log_probs = scaled.gather(-1, ids) - norm.unsqueeze(-1)
    if ids.shape[-1] == scaled.shape[-1]:
        # The lowest number in place of -inf: `exp(rest) * rest` would be NaN.
        return log_probs, torch.full_like(norm, torch.finfo(torch.float32).min)
    # 1 - the sum of the kept tokens would lose all digits of a small rest.
    others = scaled.scatter(-1, ids, -torch.inf)
    return log_probs, others.logsumexp(dim=-1) - norm


class LogitImitation(Strategy):
    """Strategy `"kl"`: the distribution of each token stays near that of the base model."""

    name = "kl"
    measures = True
    kind = "logits"
    wants_logits = True
    wants_parts = True

    def __init__(self, *, kl_top_k: int = 64, kl_temperature: float = 2.0, **about: Any) -> None:
        self.field = f"top {kl_top_k} logits at temperature {kl_temperature:g}"
        super().__init__(**about)
        self._top_k = kl_top_k
        self._temperature = kl_temperature

    def keep(self, states: Sequence[Tensor], logits: Tensor | None) -> Tensors:
        """Keep the likeliest tokens and the rest, as `top_logits`."""
        assert logits is not None  # noqa: S101
        return top_logits(logits, self._top_k, self._temperature)._asdict()

    def distance(self, seen: Seen, targets: Tensors, constants: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the divergence of each row; elements are not counted."""
        tolerance = LEAST_DIVERGENCE_16_BITS if self.half else LEAST_DIVERGENCE
        divergence = top_k_kl(seen.logits, TopLogits(**targets), seen.mask, self._temperature, tolerance)
        nothing = torch.zeros_like(divergence)
        return divergence, nothing, nothing
