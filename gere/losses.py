"""Replay losses: tensors and masks in, one value per row out.

A row with nothing to say (no real token, no violation) gives 0 with its graph attached, so that `backward` works and
every rank takes part in the gradient exchange.
"""

from __future__ import annotations

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
    current = state if state.dtype == torch.float64 else state.float()
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
    width = max(1, chunk_tokens // max(1, len(logits)))
    chunks = list(zip(logits.split(width, dim=1), targets.split(width, dim=1), strict=True))
    if len(chunks) == 1:
        total = _ce_sum(*chunks[0])
    else:
        totals = [checkpoint(_ce_sum, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        total = torch.stack(totals).sum(dim=0)
    return total / predicted.sum(dim=1).clamp(min=1)


def _ce_sum(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape).sum(dim=1)


def row_weight(w_strategy: float | Literal["dy"], ce: Tensor, distance: Tensor) -> Tensor:
    """Weight of the distance of each row; carries no gradient and needs no device sync.

    Args:
        w_strategy: A fixed number, or `"dy"` for CE / (distance + 1e-8).
        ce: Cross-entropy of each row, shape [b].
        distance: Distance of each row, shape [b].

    Returns:
        Weights, shape [b].
    """
    if w_strategy == "dy":
        return ce.detach() / (distance.detach() + 1e-8)
    return torch.full_like(distance.detach(), w_strategy)
