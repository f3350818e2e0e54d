"""How a model is called: on replay rows in training, and as the base model that it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gere import _compat
from gere.losses.strategy import Seen
from gere.model.adapters import adapters_disabled
from gere.model.states import StateReader


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off gradients and dropout; afterwards every module has the mode that it had."""
    # `model.train()` would also wake modules that the user keeps in eval mode.
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


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Show the base model: in eval mode, without gradients, its adapter disabled, as if it were not compiled."""
    with _compat.uncompiled(), evaluating(model), adapters_disabled(model):
        yield


def see(model: nn.Module, reader: StateReader, ids: Tensor, mask: Tensor) -> Seen:
    """Call a model on replay rows in training, and read the states that its strategy holds.

    Args:
        model: The model, wrapped or not.
        reader: Reads its states.
        ids: Token ids, [b, t].
        mask: Real tokens, [b, t].

    Raises:
        UnsupportedModelError: If the model gives no such states.
    """
    # Compiled code does not know the hooks of the reader, which come later, and rounds in another way than the base
    # model did when it was anchored. Both would count as drift.
    with _compat.uncompiled(), reader.reading():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return Seen(reader.states, logits, ids, mask)
