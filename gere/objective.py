"""The replay loss of a batch: forward pass of the current or the base model, losses, weights and what is logged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gere.cache import Anchor, Bands, Distilled, unpack
from gere.collator import pad_rows
from gere.errors import UnsupportedModelError
from gere.losses import Normalization, margin_sums, next_token_ce, normalize_margin, row_weight
from gere.states import StateReader, adapters_disabled

TOLERATED_HOOK_DIFFERENCE = 1e-6
# Rounding in 16 bits moves single elements over their bands by more than the tolerance that was measured. A row with
# so few violations has not drifted: training violates hundreds of times as many.
NOISE_SHARE_16_BITS = 1e-4


class ReplayObjective:
    """CE_i + w_i D_i, summed over the replay rows of a batch.

    Args:
        w_strategy: Weight of the distance, a number or `"dy"`.
        normalization: What the margin of a row is divided by.
        anchor: Bands of the base model; without regions the distance is 0.
    """

    def __init__(self, w_strategy: float | Literal["dy"], normalization: Normalization, anchor: Anchor) -> None:
        self.w_strategy = w_strategy
        self.normalization = normalization
        self._bands = anchor.bands if anchor.dim else None
        self._noise_share = NOISE_SHARE_16_BITS if re.search(r"(bf|fp|float)16", anchor.fields["dtype"]) else 0.0

    def __call__(
        self, model: nn.Module, reader: StateReader, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model on replay rows.

        Args:
            model: The wrapped model, as the trainer calls it.
            reader: Reads the state of the model inside.
            batch: Replay part of a mixed batch.

        Returns:
            The sum over the rows, and detached sums for the log by name.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with reader.reading():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            ce = next_token_ce(logits, ids, mask)
            sums = {"rows": torch.ones_like(ce.detach()), "ce": ce.detach(), "gain": ce.detach() - batch["base_ce"]}
            if self._bands is None:
                return ce.sum(), _totals(sums)
            state = reader.state
            if self._bands.lower.device != state.device:
                self._bands = Bands(*(band.to(state.device) for band in self._bands))
            lower, upper, tolerance = self._bands
            region = unpack(batch["packed_regions"], state.shape[-1])
            margin = margin_sums(state, region, lower, upper, mask, tolerance)
        drifted = margin.violated > self._noise_share * margin.elements
        distance = torch.where(drifted, normalize_margin(margin, self.normalization), 0.0)
        weight = row_weight(self.w_strategy, ce, distance)
        active = (distance.detach() > 0).to(ce)
        sums |= {"tm": distance.detach(), "weight": weight * active, "active": active}
        sums |= {"violated": margin.violated, "elements": margin.elements}
        return (ce + weight * distance).sum(), _totals(sums)


class StepShare(NamedTuple):
    """How the parts of one optimizer step add up to L = T/B L_task + 1/B sum_i (CE_i + w_i D_i).

    Attributes:
        task_rows: T, over all ranks and accumulation steps.
        replay_rows: R, likewise.
        ranks: Number of ranks, over which gradients are averaged.
        divisor: What the trainer divides each loss by: the accumulation steps, or `None` if it does not divide,
            since the parent's losses of the step already add up to L_task.
    """

    task_rows: int
    replay_rows: int
    ranks: int
    divisor: int | None

    @property
    def _rows(self) -> int:
        return self.task_rows + self.replay_rows

    def task_factor(self, rows_here: int) -> float:
        """Factor of the parent's loss of a micro-batch; the parent's means count by their rows."""
        if self.divisor is None:
            return self.task_rows / self._rows
        return rows_here * self.ranks * self.divisor / self._rows

    @property
    def replay_factor(self) -> float:
        """Factor of the sum over the replay rows of a micro-batch."""
        return self.ranks * (self.divisor or 1) / self._rows

    def logged_factor(self, rows_here: int) -> float:
        """What a parent's loss adds to the logged L_task, the mean over ranks taken later."""
        return 1.0 if self.divisor is None else rows_here * self.ranks / self.task_rows


def _totals(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.sum() for name, values in sums.items()}


class BaseModel:
    """The base model as a function of replay rows: eval mode, no gradient, adapter disabled, training's autocast.

    Args:
        model: The model without its distributed wrapper.
        pad_id: Padding token.
        device: Where the model is.
        autocast: Makes the context in which training computes.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._model: Any = model
        self._pad_id = pad_id
        self._device = device
        self._autocast = autocast
        self._head: nn.Module | None = None
        self._checked = False

    def __call__(self, rows: Sequence[Sequence[int]]) -> Distilled:
        """States and cross-entropies of rows of token ids."""
        batch = {name: part.to(self._device) for name, part in pad_rows(rows, self._pad_id).items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        reader = StateReader(self._model)
        with self._as_base(), reader.reading():
            if not self._checked:
                self._check(reader, ids[:1], mask[:1])
            if self._head is None:
                logits = self._model(**batch, use_cache=False).logits
                return Distilled(reader.state, next_token_ce(logits, ids, mask))
            self._model(**batch, use_cache=False, logits_to_keep=1)
            return Distilled(reader.state, self._ce_by_head(self._head, reader.state, ids, mask))

    def _as_base(self) -> ExitStack:
        stack = ExitStack()
        training = self._model.training
        stack.callback(self._model.train, training)
        self._model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(self._autocast())
        stack.enter_context(adapters_disabled(self._model))
        return stack

    def _check(self, reader: StateReader, ids: Tensor, mask: Tensor) -> None:
        """Compare the hook with `hidden_states[-1]`, and the head alone with the logits, once."""
        outputs = self._model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        last = outputs.hidden_states[-1]
        gap = (reader.state.float() - last.float()).abs().max().item()
        if gap > TOLERATED_HOOK_DIFFERENCE:
            raise UnsupportedModelError(
                "The state that the decoder gives is not the last hidden state.",
                where=type(self._model).__name__,
                expected="equal tensors",
                found=f"a largest difference of {gap:g}",
                fix="Use a Hugging Face causal language model whose head reads the decoder's output.",
            )
        self._head = self._plain_head(reader.state, outputs.logits, ids, mask)
        self._checked = True

    def _plain_head(self, state: Tensor, logits: Tensor, ids: Tensor, mask: Tensor) -> nn.Module | None:
        """The head, if the logits are its output unchanged (no soft cap, no scale) and can be left out."""
        head = self._model.get_output_embeddings() if hasattr(self._model, "get_output_embeddings") else None
        if head is None or head(state).shape != logits.shape or not torch.equal(head(state).to(logits), logits):
            return None
        try:
            self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        except TypeError:
            return None
        return head

    def _ce_by_head(self, head: nn.Module, state: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of each row with the logits of one row at a time, real tokens only."""
        lengths = mask.sum(dim=1).tolist()
        rows = zip(state, ids, lengths, strict=True)
        losses = [
            next_token_ce(head(s[None, : n - 1]), i[None, :n], torch.ones_like(i[None, :n])) for s, i, n in rows
        ]  # no logits for the last token, which predicts nothing
        return torch.cat(losses)
