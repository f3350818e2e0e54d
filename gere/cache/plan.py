"""The plan of an anchor: what it is built from, and how its rows are grouped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from gere.losses.strategy import Strategy, Tensors
from gere.model.batching import batches_by_length

PART_BYTES = 64 << 20
LEAST_PARTS = 32  # enough for that many ranks to find a share each


class Distilled(NamedTuple):
    """Output of the base model for a padded batch, as far as an anchor keeps it.

    Attributes:
        ce: Cross-entropy of each row, shape [b].
        kept: For each row what the strategy keeps of it, tensors of shape [tokens of the row, *].
    """

    ce: Tensor
    kept: list[Tensors]


class BuildPlan(NamedTuple):
    """Everything that decides the bytes of an anchor, beside the model.

    Attributes:
        fields: What the anchor depends on.
        rows: Token ids of the replay rows.
        strategy: What is kept.
        batch_tokens: Padded tokens that one forward pass may have.
        worth_tokens: Padded tokens from which on a longer forward pass is no faster; `None` for `batch_tokens`.
        heldout: Token ids of the held-out rows, of which only the loss is kept.
        sample: Some of the base model's weights, float32 [k], by which it is known again in another precision.
    """

    fields: Mapping[str, str]
    rows: Sequence[Sequence[int]]
    strategy: Strategy
    batch_tokens: int
    worth_tokens: int | None = None
    heldout: Sequence[Sequence[int]] = ()
    sample: Sequence[float] = ()

    def of_heldout(self) -> BuildPlan:
        """The same plan for the held-out rows alone, without what a strategy keeps."""
        return self._replace(rows=self.heldout, heldout=(), strategy=LOSSES_ONLY)


LOSSES_ONLY = Strategy(depth=1)
Distil = Callable[[Sequence[Sequence[int]]], Distilled]


def parts_of(plan: BuildPlan, width: int) -> Iterator[list[list[int]]]:
    """Group batches into parts, where `width` numbers of 4 bytes are kept of a token."""
    # The number of ranks must not matter here: a resumed build may have more or fewer, and needs the same parts.
    budget = min(PART_BYTES // (4 * max(1, width)), sum(map(len, plan.rows)) // LEAST_PARTS)
    part: list[list[int]] = []
    tokens = 0
    for batch in batches_by_length(plan.rows, plan.worth_tokens or plan.batch_tokens):
        size = sum(len(plan.rows[row]) for row in batch)
        if part and tokens + size > budget:
            yield part
            part, tokens = [], 0
        part.append(batch)
        tokens += size
    if part:
        yield part
