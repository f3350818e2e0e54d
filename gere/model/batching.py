"""Turn rows of token ids into batches: padded, and grouped by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad rows of token ids on the right; returns `input_ids` and `attention_mask`, int64 [b, t]."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def batches_by_length(rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of rows of similar length, longest first, each within a budget of padded tokens.

    A row that is longer than the budget is a batch on its own.
    """
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    batch: list[int] = []
    for row in order:
        # The first row is the longest, and all others are padded to it.
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def shortest_row(rows: Sequence[Sequence[int]]) -> int:
    """Return the index of the shortest row, which makes the cheapest dummy row."""
    return min(range(len(rows)), key=lambda row: len(rows[row]))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor from main memory to a device in a training step, without waiting for a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from memory that is not pinned waits until the GPU has finished all work that was queued before.
    return tensor.pin_memory().to(device, non_blocking=True)
