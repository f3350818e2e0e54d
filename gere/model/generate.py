"""Generate text with settings of our own, and leave the model's generation settings as they were."""

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
    """Return new token ids for each context; a row that was ended by one of `stops` has it as its last token.

    The model has no distributed wrapper, and the caller chooses its mode. An encoder-decoder reads the contexts in its
    encoder. `sampling` has `temperature`, `top_p` and `top_k`; `None` takes the likeliest token each time.
    """
    # PEFT's own generate would put its generation settings into the model.
    causal: Any = base_module(model)
    width = max(map(len, contexts))
    encodes = bool(causal.config.is_encoder_decoder)
    ids, mask = torch.full((len(contexts), width), pad_id), torch.zeros(len(contexts), width, dtype=torch.int64)
    for row, context in enumerate(contexts):
        # On the left, since generate continues after the last column of each row; an encoder counts from the first.
        first = 0 if encodes else width - len(context)
        ids[row, first : first + len(context)] = torch.tensor(context)
        mask[row, first : first + len(context)] = 1
    settings = GenerationConfig(
        do_sample=sampling is not None,
        **(sampling or {}),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=sorted(stops) or None,
        decoder_start_token_id=_decoder_start(causal) if encodes else None,
    )
    device = causal.get_input_embeddings().weight.device
    # generate takes what the settings of a call leave open from the model's own, so those are replaced, too.
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
    # A decoder begins with its start token, and other models with the context.
    return [_up_to(row, stops) for row in rows[:, 1 if encodes else width :].tolist()]


def _decoder_start(model: Any) -> int | None:
    """Return the token that a decoder begins with."""
    for config in (model.generation_config, model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    return None


def _up_to(row: list[int], stops: set[int]) -> list[int]:
    """Return the tokens up to the first that ends the text; what follows is padding."""
    for place, token in enumerate(row):
        if token in stops:
            return row[: place + 1]
    return row


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of one device, and restore their states afterwards."""
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices, device_type=device.type):
        # torch.manual_seed would seed every device of the machine, whose states are not restored.
        torch.default_generator.manual_seed(seed)
        if devices:
            backend = torch.get_device_module(device)
            with backend.device(devices[0]):
                backend.manual_seed(seed)
        yield
