"""The forward pass of replay rows: along with the task rows of a micro-step that holds both, or by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gere import _compat
from gere.distances import Seen
from gere.states import StateReader, decoder_of, has_disabled_adapter

# Padding that one call may have beyond two, as a share of their tokens: a second call takes a twentieth of the time of
# a step (docs/performance.md).
MOST_PADDING = 1 / 20
# Outputs of a decoder beside its state, which would hold rows that are not the parent's.
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


class ReplayPass:
    """Calls the model on replay rows, or lets them go along when the parent calls it on task rows.

    To go along, the rows are added to the parent's own where these enter the decoder, and their states are taken out
    where they leave it. Head, loss and all that the parent does with them never see a replay row.

    A hook of somebody else on the decoder or its layers sees them, too. So does a backward pass inside the parent's
    `compute_loss`, which then leaves nothing for the trainer's own.

    DDP waits for the calls of its wrapper on all processes. With a head, a micro-step has one on each of them, the
    parent's: rows that do not fit into it are run by the model inside, and a process without replay rows runs none.

    Args:
        model: The model without its distributed wrapper.
        reader: Reads its states.
        head: Gives the logits from the last-layer state, on all processes or on none; `None` if replay rows shall
            always go by themselves.
        autocast: Makes the context in which training computes.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: StateReader,
        head: nn.Module | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model = model
        self._decoder = decoder_of(model)
        self._reader = reader
        self._head = head
        self._autocast = autocast
        self._call: _JointCall | None = None

    @property
    def joins(self) -> bool:
        """Whether a micro-step with task rows has one call of the wrapped model, the parent's."""
        return self._head is not None

    @contextmanager
    def along(self, batch: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Let the rows of `batch` go along in the first call of the model that trains it, if they fit there."""
        self._call = None
        if self._head is None or batch is None:
            yield
            return
        with self._reader.reading() as reader:
            call = _JointCall(reader, batch)
            with call.hooked(self._decoder):
                yield
        self._call = call  # not of a parent that failed: a caller that goes on has rows of another micro-step

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Seen:
        """What the model gives for replay rows.

        Args:
            model: The wrapped model, as the trainer calls it.
            batch: Replay part of a mixed batch, the one that `along` was given if it was.
        """
        call, self._call = self._call, None
        mask = batch["attention_mask"]
        if call is not None and call.states is not None and self._head is not None:
            last, *states = call.states
            with self._autocast():
                return Seen(states, self._head(last), mask)
        called = model if call is None else self._model
        with _compat.uncompiled(), self._reader.reading() as reader:
            logits = called(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
            return Seen(reader.states, logits, mask)


class _JointCall:
    """The parent's call of a micro-step, and the replay rows that go along in it.

    Args:
        reader: Reads the states of the call.
        batch: Replay part of the micro-batch.

    Attributes:
        states: States of the replay rows, the last one and those of the asked layers; `None` if they did not go along.
    """

    def __init__(self, reader: StateReader, batch: Mapping[str, Tensor]) -> None:
        self.states: list[Tensor] | None = None
        self._reader = reader
        self._replay = _Tokens(batch["input_ids"], batch["attention_mask"])
        self._decided = False
        self._task: tuple[int, int] | None = None

    @contextmanager
    def hooked(self, decoder: nn.Module) -> Iterator[None]:
        """Watch the calls of the decoder."""
        hooks = (
            decoder.register_forward_pre_hook(self._add, with_kwargs=True),
            decoder.register_forward_hook(self._take),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: put the replay rows below those of the parent; the first call that trains decides."""
        if self._decided or not torch.is_grad_enabled() or has_disabled_adapter(decoder):
            return None
        self._decided = True
        task, replay = _plain_tokens(decoder, args, kwargs), self._replay
        if task is None or not _fits(task.ids, replay.ids):
            return None
        self._task = len(task.ids), task.ids.shape[1]
        ids, mask = _stack(task.ids, replay.ids), _stack(task.mask, replay.mask)
        return (), {**kwargs, "input_ids": ids, "attention_mask": mask}

    def _take(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the decoder: keep the states of the replay rows, and hand on those of the parent's."""
        if self._task is None:
            return None
        (rows, width), self._task = self._task, None
        own = self._replay.ids.shape[1]
        self.states = [state[rows:, :own] for state in (self._reader.state, *self._reader.states)]
        return _with_state(output, self._reader.state[:rows, :width].contiguous())  # Liger's loss takes views of it


class _Tokens(NamedTuple):
    """Token ids and mask of a padded batch, each [b, t]."""

    ids: Tensor
    mask: Tensor


def _plain_tokens(decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Tokens | None:
    """Rows that a decoder is called on, if they are all it is called on: no positions, images, embeddings, cache."""
    config = getattr(decoder, "config", None)
    if args[1:] or any(kwargs.get(name) or getattr(config, name, False) for name in OUTPUTS):
        return None
    others = dict(kwargs)
    ids, mask = others.pop("input_ids", args[0] if args else None), others.pop("attention_mask", None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not all(map(_is_setting, others.values())):
        return None
    if mask is None:
        mask = torch.ones_like(ids)
    return _Tokens(ids, mask) if isinstance(mask, Tensor) and mask.shape == ids.shape else None


def _is_setting(value: Any) -> bool:
    """Whether an argument says nothing of single rows."""
    return not value.dim() if isinstance(value, Tensor) else isinstance(value, bool | int | float | str | None)


def _fits(task: Tensor, replay: Tensor) -> bool:
    """Whether one call pads little more than two, one for each batch of token ids."""
    together = (len(task) + len(replay)) * max(task.shape[1], replay.shape[1])
    return together <= (1 + MOST_PADDING) * (task.numel() + replay.numel())


def _stack(task: Tensor, replay: Tensor) -> Tensor:
    """Both batches as one, padded on the right by 0, where a causal model sees nothing of it."""
    width = max(task.shape[1], replay.shape[1])
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in (task, replay.to(task))])


def _with_state(output: Any, state: Tensor) -> Any:
    """Output of a decoder with another state."""
    if isinstance(output, Tensor):
        return state
    if isinstance(output, tuple):
        return (state, *output[1:])
    output.last_hidden_state = state
    return output
