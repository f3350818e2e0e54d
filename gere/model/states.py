"""Find the states of a decoder-only language model, and read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from gere.errors import UnsupportedModelError
from gere.model.adapters import base_module


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the module whose output is the state that the head reads; `model` has no distributed wrapper."""
    causal: Any = base_module(model)
    candidates = []
    # First, since OPT never calls its `base_model` as a module. In transformers 4, `get_decoder` of GPT-2, Falcon and
    # others gives the model itself; their decoder is `base_model`.
    if callable(getattr(causal, "get_decoder", None)):
        candidates.append(causal.get_decoder())
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


def is_reentrant(model: nn.Module) -> bool:
    """Return whether a module of the model recomputes its activations by reentrant checkpointing."""
    for module in model.modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        # LLaMA-Factory wraps the `functools.partial` in which transformers puts the setting.
        while hasattr(function, "__wrapped__") and not hasattr(function, "keywords"):
            function = function.__wrapped__
        # A function that does not say counts as reentrant, as functions other than torch's own are.
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            return True
    return False


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """Return the layers of a decoder, if it has exactly one list of them."""
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
    """Return the number of layers of a causal language model; 1 if its configuration has none."""
    config: Any = getattr(base_module(model), "config", None)
    # A model that also reads images keeps the settings of its language model one level down.
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return int(getattr(config, "num_hidden_layers", None) or 1)


class StateReader:
    """Reads hidden states by forward hooks, with their graph, while the wrapped model is called.

    Args:
        model: The model without its distributed wrapper.
        layers: Layers whose output is read, 1 for the first. The last one stands for the state after the final norm,
            which the head reads; that one is always read.
    """

    # A hook on the decoder fires under PEFT, DDP, gradient checkpointing and fused heads. A hook on the head does not:
    # TRL and Liger never call it as a module. `output_hidden_states` would keep the states of all layers in memory.

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()) -> None:
        decoder, depth = decoder_of(model), depth_of(model)
        self._modules: dict[int, nn.Module] = {0: decoder}  # 0 stands for the last layer
        self._asked = [0 if layer == depth else layer for layer in layers]
        for layer in filter(None, self._asked):
            self._modules[layer] = layers_of(decoder)[layer - 1]
        self._read: dict[int, Tensor] = {}

    @contextmanager
    def reading(self) -> Iterator[StateReader]:
        """Capture the states of the forward pass inside the `with` block; they are gone after it."""
        handles = [module.register_forward_hook(partial(self._keep, key)) for key, module in self._modules.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._read = {}

    @property
    def state(self) -> Tensor:
        """The last-layer state of the last forward pass, shape [b, t, d]."""
        return self._state_of(0)

    @property
    def states(self) -> list[Tensor]:
        """The states of the layers that were asked for, in their order, each [b, t, d]."""
        return [self._state_of(layer) for layer in self._asked]

    def _state_of(self, layer: int) -> Tensor:
        if layer not in self._read:
            raise UnsupportedModelError(
                f"The model gave no state of layer {layer}." if layer else "The model gave no last-layer state.",
                where=type(self._modules[layer]).__name__,
                expected="the forward pass to call this module",
                fix="Use a Hugging Face causal language model; nn.DataParallel is not supported.",
            )
        return self._read[layer]

    def _keep(self, layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            output = output[0]
        elif not isinstance(output, Tensor):
            output = output.last_hidden_state
        self._read[layer] = output
