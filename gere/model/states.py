"""The states of a decoder-only language model: where they are, and how to read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gere.errors import UnsupportedModelError
from gere.model.adapters import base_module


def decoder_of(model: nn.Module) -> nn.Module:
    """Find the module whose output is the state that the head reads.

    Args:
        model: A causal language model, possibly inside PEFT, without its distributed wrapper.

    Returns:
        The decoder module.

    Raises:
        UnsupportedModelError: If there is none beside the model itself.
    """
    causal = base_module(model)
    candidates = []
    if callable(getattr(causal, "get_decoder", None)):
        candidates.append(causal.get_decoder())  # type: ignore[operator]
    candidates.append(getattr(causal, "base_model", None))
    for candidate in candidates:
        if isinstance(candidate, nn.Module) and candidate is not causal:
            return candidate
    raise UnsupportedModelError(
        "The decoder of the model cannot be found.",
        where=type(causal).__name__,
        expected="get_decoder() or base_model to name a module inside the model",
        fix="Use a Hugging Face causal language model.",
    )


def plain_head(model: Any, state: Tensor, logits: Tensor) -> nn.Module | None:
    """Find the head, if the logits are its output unchanged: no soft cap, no scale.

    Args:
        model: A causal language model, possibly inside PEFT.
        state: Last-layer state, [b, t, d].
        logits: What the model made of it, [b, t, v].
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    own = head(state)
    return head if own.shape == logits.shape and torch.equal(own.to(logits), logits) else None


def is_reentrant(model: nn.Module) -> bool:
    """Whether a module of the model recomputes its activations by reentrant checkpointing.

    A function that does not say is taken for reentrant, which is how others than torch's own are made.
    """
    for module in model.modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        while hasattr(function, "__wrapped__") and not hasattr(function, "keywords"):
            function = function.__wrapped__
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            return True
    return False


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """Find the layers of a decoder.

    Raises:
        UnsupportedModelError: If there is not exactly one list of them.
    """
    config: Any = getattr(decoder, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    found = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == depth]
    if len(found) != 1:
        raise UnsupportedModelError(
            "The layers of the model cannot be found.",
            where=type(decoder).__name__,
            expected=f"one list of {depth} layers",
            found=f"{len(found)} such lists",
            fix='Leave gere_config.layers at "last", or use a Hugging Face causal language model.',
        )
    return found[0]


def depth_of(model: nn.Module) -> int:
    """Number of layers of a causal language model; 1 if it does not say."""
    config: Any = getattr(base_module(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "num_hidden_layers", None) or 1)


class StateReader:
    """Reads hidden states by forward hooks while the full wrapped model is called.

    A hook on the decoder fires under PEFT, DDP, gradient checkpointing and fused heads, where a hook on the head does
    not, and keeps the graph.

    Args:
        model: The model without its distributed wrapper.
        layers: Layers whose output is read, 1 for the first; the last one stands for the state after the final norm,
            which the head reads, and is always read.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()) -> None:
        self._decoder = decoder_of(model)
        self._layers = tuple(layers)
        depth = depth_of(model)
        self._inner = {layer: layers_of(self._decoder)[layer - 1] for layer in layers if layer != depth}
        self._read: dict[int, Tensor] = {}

    @contextmanager
    def reading(self) -> Iterator[StateReader]:
        """Capture the states of the forward pass inside the `with` block."""
        handles = [self._decoder.register_forward_hook(partial(self._keep, 0))]
        handles += [module.register_forward_hook(partial(self._keep, layer)) for layer, module in self._inner.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._read = {}

    @property
    def state(self) -> Tensor:
        """The last-layer state of the last forward pass, shape [b, t, d].

        Raises:
            UnsupportedModelError: If the decoder was not called.
        """
        return self._state_of(0, self._decoder)

    @property
    def states(self) -> list[Tensor]:
        """The states of the asked layers, in their order, each [b, t, d]; errors as for `state`."""
        return [
            self._state_of(layer, self._inner[layer]) if layer in self._inner else self.state for layer in self._layers
        ]

    def _state_of(self, place: int, module: nn.Module) -> Tensor:
        if place not in self._read:
            raise UnsupportedModelError(
                "The model gave no last-layer state." if not place else f"The model gave no state of layer {place}.",
                where=type(module).__name__,
                expected="the forward pass to call this module",
                fix="Use a Hugging Face causal language model; nn.DataParallel is not supported.",
            )
        return self._read[place]

    def _keep(self, place: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._read[place] = output
        else:
            self._read[place] = output[0] if isinstance(output, tuple) else output.last_hidden_state
