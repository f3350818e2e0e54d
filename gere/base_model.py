"""The base model as a function of replay rows: what the anchor is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gere import _compat
from gere.cache import Distilled
from gere.collator import pad_rows
from gere.errors import UnsupportedModelError
from gere.losses import next_token_ce
from gere.states import StateReader, adapters_disabled

TOLERATED_HOOK_DIFFERENCE = 1e-6


class BaseModel:
    """The base model as a function of replay rows: eval mode, no gradient, adapter disabled, training's autocast.

    Args:
        model: The model without its distributed wrapper.
        pad_id: Padding token.
        device: Where the model is.
        autocast: Makes the context in which training computes.
        whole: Call nothing but the whole model, since its weights are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        whole: bool = False,
    ) -> None:
        self._model: Any = model
        self._pad_id = pad_id
        self._device = device
        self._autocast = autocast
        self._whole = whole
        self._head: nn.Module | None = None
        self._checked = False

    def __call__(self, rows: Sequence[Sequence[int]]) -> Distilled:
        """States and cross-entropies of rows of token ids."""
        batch = {name: part.to(self._device) for name, part in pad_rows(rows, self._pad_id).items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        reader = StateReader(self._model)
        with _compat.uncompiled(), self._as_base(), reader.reading():
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
        if not self._whole:
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
