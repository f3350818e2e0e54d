"""The base model as a function of replay rows: what the anchor is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gere import _compat
from gere.cache import Distilled, Target
from gere.collator import pad_rows
from gere.errors import UnsupportedModelError
from gere.losses import next_token_ce, token_ce
from gere.states import StateReader, adapters_disabled, plain_head

TOLERATED_HOOK_DIFFERENCE = 1e-6
# Tokens whose logits are there at one time: on a CPU few enough for memory that is used again and not mapped anew.
HEAD_TOKENS, HEAD_TOKENS_OF_OTHERS = {"cpu": 128}, 1024


class BaseModel:
    """The base model as a function of replay rows: eval mode, no gradient, adapter disabled, training's autocast.

    Args:
        model: The model without its distributed wrapper.
        pad_id: Padding token.
        device: Where the model is.
        target: What is kept of it.
        autocast: Makes the context in which training computes.
        whole: Call nothing but the whole model, since its weights are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        device: torch.device,
        target: Target,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        whole: bool = False,
    ) -> None:
        self._model: Any = model
        self._pad_id = pad_id
        self._device = device
        self._target = target
        self._autocast = autocast
        self._whole = whole
        self._head: nn.Module | None = None
        self._checked = False
        self._reader = StateReader(model, target.layers)

    def __call__(self, rows: Sequence[Sequence[int]]) -> Distilled:
        """What is kept of rows of token ids, and their cross-entropies."""
        batch = {name: part.to(self._device) for name, part in pad_rows(rows, self._pad_id).items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = [len(row) for row in rows]
        with _compat.uncompiled(), self._as_base(), self._reader.reading() as reader:
            if not self._checked:
                self._check(reader, ids[:1, : lengths[0]], mask[:1, : lengths[0]])
            if self._head is None:
                logits = self._model(**batch, use_cache=False).logits
                kept = [self._keep(row, n, logits[row, :n]) for row, n in enumerate(lengths)]
                return Distilled(next_token_ce(logits, ids, mask), kept)
            self._model(**batch, use_cache=False, logits_to_keep=1)
            return self._by_head(self._head, ids, lengths)

    def targets(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What is kept of a padded batch, tensors of shape [b, t, *], to be taken in training."""
        with _compat.uncompiled(), self._as_base(), self._reader.reading() as reader:
            if not self._checked:
                self._check(reader, ids[:1], mask[:1])
            fewer = {} if self._target.wants_logits or self._head is None else {"logits_to_keep": 1}
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **fewer).logits
            if not self._target.wants_logits:
                return self._target.keep(reader.states, None)
            rows = [self._keep(row, ids.shape[1], logits[row]) for row in range(len(ids))]  # one at a time in float32
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def head(self, row: Sequence[int]) -> nn.Module | None:
        """The head, if the logits are its output unchanged and it can be called apart from the model.

        Args:
            row: Token ids to look at it with.
        """
        batch = {name: part.to(self._device) for name, part in pad_rows([row], self._pad_id).items()}
        with _compat.uncompiled(), self._as_base(), self._reader.reading() as reader:
            if not self._checked:
                self._check(reader, batch["input_ids"], batch["attention_mask"])
        return self._head

    def _keep(self, row: int, length: int, logits: Tensor | None) -> dict[str, Tensor]:
        return self._target.keep([state[row, :length] for state in self._reader.states], logits)

    def _by_head(self, head: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Distilled:
        """What is kept of rows, and their cross-entropies, with the logits of a chunk of real tokens at a time."""
        used = [n if self._target.wants_logits else n - 1 for n in lengths]  # the last token predicts nothing
        states = torch.cat([self._reader.state[row, :n] for row, n in enumerate(used)])
        following = [F.pad(ids[row, 1:n], (0, 1), value=-100) for row, n in enumerate(lengths)]
        targets = torch.cat([row[:n] for row, n in zip(following, used, strict=True)])
        losses: list[Tensor] = []
        kept: list[dict[str, Tensor]] = []
        chunk = HEAD_TOKENS.get(self._device.type, HEAD_TOKENS_OF_OTHERS)
        for state, target in zip(states.split(chunk), targets.split(chunk), strict=True):
            logits = head(state[None])[0]
            losses.append(token_ce(logits, target))
            kept += [self._target.keep([], logits)] if self._target.wants_logits else []
        sums = torch.stack([row.sum() for row in torch.cat(losses).split(used)])
        ce = sums / torch.tensor([n - 1 for n in lengths], device=sums.device).clamp(min=1)
        if not kept:
            return Distilled(ce, [self._keep(row, n, None) for row, n in enumerate(lengths)])
        whole = {name: torch.cat([part[name] for part in kept]).split(used) for name in kept[0]}
        return Distilled(ce, [{name: rows[row] for name, rows in whole.items()} for row in range(len(lengths))])

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
        """Compare the hooks with `hidden_states`, and the head alone with the logits, once."""
        outputs = self._model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        read = [(reader.state, -1), *zip(reader.states, self._target.layers, strict=True)]
        gap = max((state.float() - outputs.hidden_states[i].float()).abs().max().item() for state, i in read)
        if gap > TOLERATED_HOOK_DIFFERENCE:
            raise UnsupportedModelError(
                "The states that the layers give are not the hidden states of the model.",
                where=type(self._model).__name__,
                expected="equal tensors",
                found=f"a largest difference of {gap:g}",
                fix="Use a Hugging Face causal language model whose head reads the decoder's output.",
            )
        if not self._whole:
            self._head = self._plain_head(reader.state, outputs.logits, ids, mask)
        self._checked = True

    def _plain_head(self, state: Tensor, logits: Tensor, ids: Tensor, mask: Tensor) -> nn.Module | None:
        """The head, if it gives the logits, and if they can be left out."""
        head = plain_head(self._model, state, logits)
        if head is None:
            return None
        try:
            self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        except TypeError:
            return None
        return head
