"""Replay losses: tensors and masks in, one value per row out.

A row with nothing to say (no real token, no violation) gives 0 with its graph attached, so that `backward` works and
every rank takes part in the gradient exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Normalization = Literal["violations", "elements"]


class MarginSums(NamedTuple):
    """What the margin of a batch is made of, each of shape [b]."""

    total: Tensor
    violated: Tensor
    elements: Tensor


def threshold_margin(
    state: Tensor,
    region: Tensor,
    lower: Tensor,
    upper: Tensor,
    mask: Tensor,
    normalization: Normalization = "violations",
    tolerance: Tensor | float = 0.0,
) -> Tensor:
    """Threshold-based margin loss (TM): keep each element in the region that it had in the base model.

    References:
        GeRe, arXiv 2508.04676, section on threshold-based margin; gere_trainer.py of the official code.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `state` | [b, t, d], float | last-layer state of the current model |
        | `region` | [b, t, d], int8 | region in the base model: -1 below `lower`, 0 between, 1 above `upper` |
        | `lower`, `upper` | [d], float | bands, in the unit of the state |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `tolerance` | [d] or number | an element outside its region by no more than this counts as inside |

    Args:
        state: Current state.
        region: Base region.
        lower: Lower band.
        upper: Upper band.
        mask: Real tokens.
        normalization: `"violations"` divides by the violated elements of the row, `"elements"` by all of them.
        tolerance: Rounding noise to be ignored. 0 is the published loss.

    Returns:
        Loss of each row, shape [b], in float32 (float64 for a float64 state).

    Relations:
        L1 and L2 pull an element to its exact base value; TM is 0 in the whole region and linear outside it. With
        `"violations"` the value grows with the size of the drift, with `"elements"` with size times frequency.

    Example:
        >>> lower, upper = torch.tensor([-1.0]), torch.tensor([1.0])
        >>> state, region = torch.tensor([[[1.5]]]), torch.zeros(1, 1, 1, dtype=torch.int8)
        >>> threshold_margin(state, region, lower, upper, torch.ones(1, 1))
        tensor([0.5000])
    """
    return normalize_margin(margin_sums(state, region, lower, upper, mask, tolerance), normalization)


def margin_sums(
    state: Tensor, region: Tensor, lower: Tensor, upper: Tensor, mask: Tensor, tolerance: Tensor | float = 0.0
) -> MarginSums:
    """Sum of margins, violated elements and real elements of each row; arguments as in `threshold_margin`."""
    real = mask.bool().unsqueeze(-1)
    current = _wide(state)
    lower, upper = lower.to(current), upper.to(current)
    ceiling = torch.where(region < 0, lower, torch.where(region > 0, torch.inf, upper))
    ground = torch.where(region > 0, upper, torch.where(region < 0, -torch.inf, lower))
    margin = F.relu(current - ceiling) + F.relu(ground - current)
    violates = real & (margin > tolerance)
    total = torch.where(violates, margin, 0.0).sum(dim=(1, 2))
    elements = mask.bool().sum(dim=1) * state.shape[-1]
    return MarginSums(total, violates.sum(dim=(1, 2)), elements)


def normalize_margin(sums: MarginSums, normalization: Normalization) -> Tensor:
    """Divide the margin sums by the count that `normalization` names; an empty count gives 0."""
    count = sums.violated if normalization == "violations" else sums.elements
    return sums.total / count.clamp(min=1)


def next_token_ce(logits: Tensor, input_ids: Tensor, mask: Tensor, chunk_tokens: int = 1024) -> Tensor:
    """Mean next-token cross-entropy of each row, without a full float32 copy of the logits.

    References:
        Label fitting in GeRe, arXiv 2508.04676; equals the official code for a batch of one row.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `logits` | [b, t, v], float | output of the language model head |
        | `input_ids` | [b, t], int64 | token ids, also the targets |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding on either side |

    Args:
        logits: Logits of the current model; those of the last position may be left out.
        input_ids: Token ids.
        mask: Real tokens.
        chunk_tokens: Tokens whose logits are held in float32 at one time.

    Returns:
        Mean over the predicted real tokens of each row, in nats, shape [b], float32 or float64.

    Relations:
        `torch.nn.functional.cross_entropy` over the same tokens, averaged by row and not over the batch.

    Example:
        >>> next_token_ce(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]), torch.ones(1, 3))
        tensor([2.0794])
    """
    real = mask.bool()
    predicted = F.pad(real[:, 1:] & real[:, :-1], (0, 1))[:, : logits.shape[1]]
    targets = F.pad(input_ids[:, 1:], (0, 1))[:, : logits.shape[1]].masked_fill(~predicted, -100)
    total = _sum_in_chunks(_ce_sum, (logits, targets), chunk_tokens)
    return total / predicted.sum(dim=1).clamp(min=1)


def _sum_in_chunks(row_sums: Callable[..., Tensor], parts: Sequence[Tensor], chunk_tokens: int) -> Tensor:
    """Add up what `row_sums` gives for a chunk of tokens of all rows; several chunks are computed again in backward.

    Args:
        row_sums: Gives a sum for each row, shape [b], of tensors like `parts` with fewer tokens.
        parts: Tensors of shape [b, t, *].
        chunk_tokens: Tokens of a chunk, over all rows.
    """
    width = max(1, chunk_tokens // max(1, len(parts[0])))
    chunks = list(zip(*(part.split(width, dim=1) for part in parts), strict=True))
    if len(chunks) == 1:
        return row_sums(*chunks[0])
    sums = [checkpoint(row_sums, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum(dim=0)


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def _ce_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return token_ce(logits.flatten(0, 1), targets.flatten()).view(targets.shape).sum(dim=1)


def token_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, shape [n], from logits [n, v] and targets [n]; 0 where a target is -100."""
    return F.cross_entropy(_wide(logits), targets, ignore_index=-100, reduction="none")


def l1_distance(state: Tensor, target: Tensor, mask: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """Feature imitation (L1): mean absolute difference to the base state.

    References:
        One of the replay objectives that GeRe, arXiv 2508.04676, compares with TM.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `state` | [b, t, d], float | last-layer state of the current model |
        | `target` | [b, t, d], float | that of the base model |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `tolerance` | number, or broadcast to [b, t, d] | a difference of no more than this counts as none |

    Args:
        state: Current state.
        target: Base state.
        mask: Real tokens.
        tolerance: Rounding of the stored target and noise, to be ignored.

    Returns:
        Mean over the real elements of each row, shape [b], float32 (float64 for a float64 state).

    Relations:
        Pushes every element with the same force however near it is; L2 with a force that grows with the distance, TM
        only those outside their region.

    Example:
        >>> l1_distance(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2), torch.ones(1, 1))
        tensor([2.])
    """
    return _mean_over_elements(_difference(state, target, mask, tolerance).abs(), mask)


def l2_distance(state: Tensor, target: Tensor, mask: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """Feature imitation (L2): mean squared difference to the base state.

    References:
        One of the replay objectives that GeRe, arXiv 2508.04676, compares with TM.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `state` | [b, t, d], float | last-layer state of the current model |
        | `target` | [b, t, d], float | that of the base model |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `tolerance` | number, or broadcast to [b, t, d] | a difference of no more than this counts as none |

    Args:
        state: Current state.
        target: Base state.
        mask: Real tokens.
        tolerance: Rounding of the stored target and noise, to be ignored.

    Returns:
        Mean over the real elements of each row, shape [b], float32 (float64 for a float64 state).

    Relations:
        The square of L1 element by element. TM with `"elements"` grows like it for small drifts, by frequency times
        size, but is 0 for what stays in its region.

    Example:
        >>> l2_distance(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2), torch.ones(1, 1))
        tensor([5.])
    """
    return _mean_over_elements(_difference(state, target, mask, tolerance).square(), mask)


def _difference(state: Tensor, target: Tensor, mask: Tensor, tolerance: Tensor | float) -> Tensor:
    current = _wide(state)
    difference = current - target.to(current)
    far = mask.bool().unsqueeze(-1) & (difference.abs() > tolerance)
    return torch.where(far, difference, 0.0)


def _mean_over_elements(values: Tensor, mask: Tensor) -> Tensor:
    return values.sum(dim=(1, 2)) / (mask.bool().sum(dim=1) * values.shape[-1]).clamp(min=1)


class TopLogits(NamedTuple):
    """The likeliest tokens of a distribution, and what is left for all others together.

    Attributes:
        ids: Their token ids, [..., k].
        log_probs: Their log-probabilities at the temperature, [..., k].
        rest: Log of the remaining probability, [...]; the lowest number if there are no other tokens.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


def top_logits(logits: Tensor, top_k: int, temperature: float) -> TopLogits:
    """Keep of a distribution what `top_k_kl` needs.

    Args:
        logits: Logits, shape [..., v].
        top_k: Tokens to keep, at most v.
        temperature: What the logits are divided by.

    Returns:
        `ids` int32, `log_probs` and `rest` float32 (float64 for float64 logits).
    """
    scaled = _wide(logits) / temperature
    ids = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1).indices
    log_probs, rest = _split(scaled, ids)
    return TopLogits(ids.to(torch.int32), log_probs, rest)


def top_k_kl(
    logits: Tensor,
    base: TopLogits,
    mask: Tensor,
    temperature: float = 2.0,
    tolerance: Tensor | float = 0.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Logit imitation (KL): divergence of the current distribution from the base one, base || model.

    The base distribution is known on its likeliest tokens; all others count as one. Merging tokens never raises a
    divergence, so the value is a lower bound of the full one, and what it misses is rest x KL inside the rest.

    References:
        One of the replay objectives that GeRe, arXiv 2508.04676, compares with TM, there with the full vocabulary and
        temperature 2, without the factor of the squared temperature.

    Inputs:
        | argument | shape | meaning |
        |---|---|---|
        | `logits` | [b, t, v], float | output of the head of the current model |
        | `base` | [b, t, k] and [b, t] | likeliest tokens of the base model, from `top_logits` |
        | `mask` | [b, t], bool or int | 1 for real tokens, 0 for padding |
        | `temperature` | number | what the logits are divided by, as for `base` |
        | `tolerance` | number | a token whose divergence is no more than this counts as 0 |

    Args:
        logits: Logits of the current model.
        base: What was kept of the base model.
        mask: Real tokens.
        temperature: Temperature.
        tolerance: Rounding noise to be ignored.
        chunk_tokens: Tokens whose logits are held in float32 at one time.

    Returns:
        Mean over the real tokens of each row, in nats, shape [b], float32 (float64 for float64 logits).

    Relations:
        Binds what the head says, where TM, L1 and L2 bind what the head reads. `next_token_ce` looks at one token.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0]]])
        >>> top_k_kl(logits, top_logits(logits, 1, 2.0), torch.ones(1, 1)).item()
        0.0
    """
    real = mask.bool()

    def total(logits: Tensor, ids: Tensor, log_probs: Tensor, rest: Tensor, real: Tensor) -> Tensor:
        divergence = token_kl(TopLogits(ids, log_probs, rest), _wide(logits) / temperature)
        return torch.where(real & (divergence > tolerance), divergence, 0.0).sum(dim=1)

    sums = _sum_in_chunks(total, (logits, *base, real), chunk_tokens)
    return sums / real.sum(dim=1).clamp(min=1)


def token_kl(base: TopLogits, scaled: Tensor) -> Tensor:
    """Divergence of each token, shape [...], from logits that are divided by the temperature, [..., v]."""
    log_q, rest_q = _split(scaled, base.ids.long())
    log_p, rest_p = base.log_probs.to(log_q), base.rest.to(log_q)
    kept = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kept + rest_p.exp() * (rest_p - rest_q)


def _split(scaled: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `ids`, and the log of what all other tokens have together."""
    norm = scaled.logsumexp(dim=-1)
    log_probs = scaled.gather(-1, ids) - norm.unsqueeze(-1)
    if ids.shape[-1] == scaled.shape[-1]:
        return log_probs, torch.full_like(norm, torch.finfo(torch.float32).min)
    others = scaled.scatter(-1, ids, -torch.inf)  # 1 - the sum of the kept would lose all digits of a small rest
    return log_probs, others.logsumexp(dim=-1) - norm
