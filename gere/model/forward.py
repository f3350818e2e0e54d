"""Call a model on replay rows in training, and call it as the base model that it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gere import _compat
from gere.losses.strategy import Seen
from gere.model.adapters import adapters_disabled
from gere.model.states import StateReader


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off gradients and dropout, and restore the mode of every module afterwards."""
    # `model.train()` would also switch modules to training that the user keeps in eval mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if _compat.repacks_in_eval_mode(module):
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models eagerly where their states are read."""
    # Code that was compiled before does not know hooks that come later. And compiled code rounds in another way than
    # the base model did when it was anchored, which would count as drift.
    return torch.compiler.set_stance("force_eager")


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Show the base model: in eval mode, without gradients, its adapter disabled, not compiled."""
    with uncompiled(), evaluating(model), adapters_disabled(model):
        yield


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Show the model as it is now: in eval mode, without gradients, not compiled."""
    with uncompiled(), evaluating(model):
        yield


def see(model: nn.Module, reader: StateReader, ids: Tensor, mask: Tensor) -> Seen:
    """Call a model, wrapped or not, on replay rows [b, t] in training, and read the states of `reader`."""
    with uncompiled(), reader.reading(ids.shape):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return Seen(reader.states, logits, ids, mask)
