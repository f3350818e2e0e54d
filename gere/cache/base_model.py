"""The base model as a function of replay rows: what an anchor is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gere.cache.plan import Distilled
from gere.losses import next_token_ce, token_ce
from gere.losses.strategy import Strategy, Tensors
from gere.model.batching import pad_rows
from gere.model.forward import as_base
from gere.model.states import Layout, StateReader

# Tokens whose logits exist at one time. On a CPU they are few enough that the allocator reuses their memory.
HEAD_TOKENS, HEAD_TOKENS_OF_OTHERS = {"cpu": 128}, 1024


class BaseModel:
    """The base model as a function of rows: eval mode, no gradient, adapter disabled, training's autocast.

    The model has no distributed wrapper, and `layout` says where its states come out. `autocast` makes the context in
    which training computes. `shown` makes the context in which the model is asked: `as_base`, or `as_trained` for what
    it is now.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        device: torch.device,
        strategy: Strategy,
        layout: Layout,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        shown: Callable[[nn.Module], AbstractContextManager[None]] = as_base,
    ) -> None:
        self._model: Any = model
        self._pad_id = pad_id
        self._device = device
        self._strategy = strategy
        self._autocast = autocast
        self._shown = shown
        self._head = layout.head
        self._reader = StateReader(layout, strategy.layers)

    def __call__(self, rows: Sequence[Sequence[int]]) -> Distilled:
        """Return what is kept of rows of token ids, and their cross-entropies."""
        batch = {name: part.to(self._device) for name, part in pad_rows(rows, self._pad_id).items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = [len(row) for row in rows]
        with self._asking(ids):
            if self._head is not None:
                # The logits of all tokens would be the largest tensor by far. 1 is the least: 0 stands for all.
                self._model(**batch, use_cache=False, logits_to_keep=1)
                return self._by_head(self._head, ids, lengths)
            logits = self._model(**batch, use_cache=False).logits
            kept = [self._keep(row, length, logits[row, :length]) for row, length in enumerate(lengths)]
            return Distilled(next_token_ce(logits, ids, mask), kept)

    def targets(self, ids: Tensor, mask: Tensor) -> Tensors:
        """Return what is kept of a padded batch [b, t], tensors of shape [b, t, *]: the targets of a live strategy."""
        with self._asking(ids):
            if self._strategy.wants_logits:
                logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                # One row at a time, since each needs a float32 copy of its logits.
                rows = [self._keep(row, ids.shape[1], logits[row]) for row in range(len(ids))]
                return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            fewer = {} if self._head is None else {"logits_to_keep": 1}
            self._model(input_ids=ids, attention_mask=mask, use_cache=False, **fewer)
            return self._strategy.keep(self._reader.states, None)

    @contextmanager
    def _asking(self, ids: Tensor) -> Iterator[None]:
        """Show the base model, and read its states on ids [b, t]."""
        with self._shown(self._model), self._autocast(), self._reader.reading(ids.shape):
            yield

    def _keep(self, row: int, length: int, logits: Tensor | None) -> Tensors:
        return self._strategy.keep([state[row, :length] for state in self._reader.states], logits)

    def _by_head(self, head: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Distilled:
        """Return the same as `__call__`, with the logits of one chunk of real tokens at a time."""
        wants_logits = self._strategy.wants_logits
        counts, states, following = [], [], []
        for row, length in enumerate(lengths):
            # The last token predicts nothing, so only a strategy that keeps logits needs those of it.
            count = length if wants_logits else length - 1
            counts.append(count)
            states.append(self._reader.state[row, :count])
            following.append(F.pad(ids[row, 1:length], (0, 1), value=-100)[:count])
        chunk = HEAD_TOKENS.get(self._device.type, HEAD_TOKENS_OF_OTHERS)
        losses: list[Tensor] = []
        kept: list[Tensors] = []
        for state, target in zip(torch.cat(states).split(chunk), torch.cat(following).split(chunk), strict=True):
            logits = head(state[None])[0]
            losses.append(token_ce(logits, target))
            if wants_logits:
                kept.append(self._strategy.keep([], logits))
        sums = torch.stack([row.sum() for row in torch.cat(losses).split(counts)])
        ce = sums / torch.tensor([length - 1 for length in lengths], device=sums.device).clamp(min=1)
        if not wants_logits:
            return Distilled(ce, [self._keep(row, length, None) for row, length in enumerate(lengths)])
        rows: list[Tensors] = [{} for _ in lengths]
        for name in kept[0]:
            joined = torch.cat([part[name] for part in kept])
            for place, values in enumerate(joined.split(counts)):
                rows[place][name] = values
        return Distilled(ce, rows)
