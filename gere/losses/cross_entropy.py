"""Next-token cross-entropy of each row, in chunks of tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gere.losses.chunks import CHUNK_TOKENS, sum_in_chunks, wide


def next_token_ce(logits: Tensor, input_ids: Tensor, mask: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Compute the mean next-token cross-entropy of each row, without a full float32 copy of the logits.

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
        >>> import torch
        >>> next_token_ce(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]), torch.ones(1, 3))
        tensor([2.0794])
    """
    real = mask.bool()
    # With padding on the left, the first real token has no real token before it.
    predicted = F.pad(real[:, 1:] & real[:, :-1], (0, 1))[:, : logits.shape[1]]
    targets = F.pad(input_ids[:, 1:], (0, 1))[:, : logits.shape[1]].masked_fill(~predicted, -100)
    (total,) = sum_in_chunks(_ce_sum, (logits, targets), chunk_tokens)
    # A row without a predicted token has loss 0 and not NaN, which would spread over the batch.
    return total / predicted.sum(dim=1).clamp(min=1)


def _ce_sum(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
    losses = token_ce(logits.flatten(0, 1), targets.flatten())
    return (losses.view(targets.shape).sum(dim=1),)


def token_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of each token, shape [n], from logits [n, v] and targets [n]; 0 for target -100."""
    return F.cross_entropy(wide(logits), targets, ignore_index=-100, reduction="none")
