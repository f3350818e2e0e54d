"""Text from a model: one call of `generate` that leaves the model's own generation settings as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from gere.model.adapters import base_module


def generate(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_new_tokens: int,
    stops: set[int],
    sampling: Mapping[str, Any] | None = None,
    criteria: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """Continue each context.

    Args:
        model: The model without its distributed wrapper; the caller chooses its mode.
        contexts: Token ids to continue, at least one a row.
        pad_id: Padding token, put before shorter contexts.
        max_new_tokens: Largest number of new tokens.
        stops: Tokens that end a text.
        sampling: `temperature`, `top_p` and `top_k`; `None` takes the likeliest token each time.
        criteria: What else ends a row.

    Returns:
        The new token ids of each row. A row that was ended by one of `stops` has it as its last token.
    """
    causal: Any = base_module(model)  # PEFT's own generate would put its generation settings into the model
    width = max(map(len, contexts))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in contexts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in contexts])
    settings = GenerationConfig(
        do_sample=sampling is not None,
        **(sampling or {}),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=sorted(stops) or None,
    )
    device = causal.get_input_embeddings().weight.device
    # What the settings of a call leave open is taken from the model's own, so those are replaced, too.
    kept, causal.generation_config = causal.generation_config, settings
    try:
        rows: Tensor = causal.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    finally:
        causal.generation_config = kept
    return [_up_to(row, stops) for row in rows[:, width:].tolist()]


def _up_to(row: list[int], stops: set[int]) -> list[int]:
    """Tokens up to the first that ends the text; what follows is padding."""
    for place, token in enumerate(row):
        if token in stops:
            return row[: place + 1]
    return row


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of one device, and restore their states afterwards."""
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        # torch.manual_seed would seed every device of the machine, whose states are not restored.
        torch.default_generator.manual_seed(seed)
        if devices:
            backend = torch.get_device_module(device)
            with backend.device(devices[0]):
                backend.manual_seed(seed)
        yield
