"""The base model as a writer: goes on from tokens by sampling, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gere import _compat
from gere.errors import UnsupportedModelError
from gere.states import adapters_disabled, base_module


class Continuation(NamedTuple):
    """Sampled tokens.

    Attributes:
        ids: Tokens up to the first that ends a text.
        ended: Whether there was one.
    """

    ids: list[int]
    ended: bool


class Writer:
    """Samples from the base model: eval mode, adapter disabled, its own generation settings left out.

    Args:
        model: The model without its distributed wrapper.
        pad_id: Padding token.
        temperature: Temperature of the sampling.
        top_p: Share of the probability that the tokens to draw from hold.

    Raises:
        UnsupportedModelError: If the model cannot generate.
    """

    def __init__(self, model: nn.Module, pad_id: int, temperature: float, top_p: float) -> None:
        self._model = model
        self._causal: Any = base_module(model)  # PEFT's own generate puts its generation settings into the model
        self._pad_id = pad_id
        self._sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0}
        if not callable(getattr(self._causal, "generate", None)):
            raise UnsupportedModelError(
                "The model cannot write the replay texts.",
                where=type(self._causal).__name__,
                expected="a Hugging Face causal language model with generate()",
                fix="Set gere_config.replay_dataset to general texts from elsewhere.",
            )

    def stops(self) -> set[int]:
        """Tokens that end a text by the model's own generation settings, such as the end of a chat turn."""
        ids = getattr(getattr(self._causal, "generation_config", None), "eos_token_id", None)
        return set() if ids is None else set(ids) if isinstance(ids, (list, tuple)) else {int(ids)}

    def go_on(self, contexts: Sequence[Sequence[int]], most: int, stops: set[int]) -> list[Continuation]:
        """Sample a continuation of each context; inside `as_base`.

        Args:
            contexts: Tokens to go on from, one or more a row.
            most: Largest number of new tokens.
            stops: Tokens that end a text.
        """
        width = max(map(len, contexts))
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + list(row) for row in contexts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in contexts])
        settings = GenerationConfig(
            do_sample=True,
            **self._sampling,
            max_new_tokens=most,
            pad_token_id=self._pad_id,
            eos_token_id=sorted(stops) or None,
        )
        device = self._causal.get_input_embeddings().weight.device
        self._causal.generation_config = settings  # what the one in the call leaves open comes from here
        rows: Tensor = self._causal.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
        )
        return [_until(row, stops) for row in rows[:, width:].tolist()]

    @contextmanager
    def as_base(self, seed: int) -> Iterator[None]:
        """Show the base model with random numbers of its own; afterwards all is as before.

        Args:
            seed: Seed of the random numbers.
        """
        kept = self._causal.generation_config
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(_compat.uncompiled())
                stack.enter_context(adapters_disabled(self._model))
                stack.enter_context(_own_randomness(self._causal.get_input_embeddings().weight.device, seed))
                self._model.eval()
                yield
        finally:
            self._causal.generation_config = kept
            for module, training in modes:
                module.training = training


def _until(row: list[int], stops: set[int]) -> Continuation:
    for place, token in enumerate(row):
        if token in stops:
            return Continuation(row[:place], True)
    return Continuation(row, False)


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generator of the CPU and of the model's device alone, and give their states back."""
    there = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(there, device_type=device.type if there else "cuda"):
        torch.default_generator.manual_seed(seed)
        if there:
            backend = torch.get_device_module(device)
            with backend.device(there[0]):
                backend.manual_seed(seed)
        yield
