"""Sums over tokens, a chunk at a time, so that few tokens need float32 copies at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024


def sum_in_chunks(
    row_sums: Callable[..., tuple[Tensor, ...]], parts: Sequence[Tensor], chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, ...]:
    """Add up what `row_sums` gives for each chunk of tokens.

    Args:
        row_sums: Takes tensors like `parts` with fewer tokens, and gives sums over the tokens of each row, each [b].
        parts: Tensors of shape [b, t, *].
        chunk_tokens: Tokens of a chunk, over all rows.
    """
    # Splitting along the tokens keeps a sum for each row. The batch may be empty.
    width = max(1, chunk_tokens // max(1, len(parts[0])))
    chunks = list(zip(*(part.split(width, dim=1) for part in parts), strict=True))
    if len(chunks) == 1:
        return row_sums(*chunks[0])
    # Backward computes each chunk again. Otherwise the float32 copies of all chunks would wait for it in memory.
    # Nothing in a loss is random, so its random states need no copy.
    sums = [checkpoint(row_sums, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(torch.stack(values).sum(dim=0) for values in zip(*sums, strict=True))


def wide(values: Tensor) -> Tensor:
    """Convert values to float32; float64 stays."""
    if values.dtype == torch.float64:
        return values
    return values.float()
