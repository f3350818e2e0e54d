"""The states of a decoder-only language model: where they are, and how to read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gere.errors import UnsupportedModelError

SHIFTING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_unanchorable(model: nn.Module) -> None:
    """Refuse models that replay of plain text is not defined for, or whose base is no longer there.

    Raises:
        UnsupportedModelError: If the model is an encoder-decoder, or its adapter took a part of the base weights.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "Replay needs a decoder-only language model.",
            where=type(model).__name__,
            expected="config.is_encoder_decoder = False",
            found="an encoder-decoder model",
            fix="Train a causal language model, or use the plain Trainer for this one.",
        )
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                "Virtual tokens change the length of every row, so that replay rows do not fit their regions.",
                where=f"adapter {name!r}",
                expected="an adapter of weights, such as LoRA",
                found=type(config).__name__,
                fix="Use LoRA, or the plain Trainer for this model.",
            )
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(SHIFTING_INITS):
            raise UnsupportedModelError(
                "The adapter was initialised by moving a part of the base weights into it, so that the model with its "
                "adapter disabled is not the base model.",
                where=f"adapter {name!r}",
                expected="init_lora_weights that leaves the base weights alone, such as True or 'gaussian'",
                found=repr(init),
                fix="Use the default initialisation.",
            )


def base_module(model: nn.Module) -> nn.Module:
    """Return the causal language model inside wrappers such as PEFT.

    Args:
        model: A model without its distributed wrapper.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


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


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries PEFT adapters, so that its base is still there."""
    return hasattr(model, "disable_adapter") or bool(getattr(model, "_hf_peft_config_loaded", False))


def has_disabled_adapter(model: nn.Module) -> bool:
    """Whether an adapter inside is disabled, so that a call is one of the base model."""
    return any(getattr(module, "disable_adapters", False) is True for module in model.modules())


def reads_rows_itself(model: Any) -> bool:
    """Whether an adapter looks at the token ids of each row before the decoder does, as aLoRA for its invocation."""
    configs = (getattr(model, "peft_config", None) or {}).values()
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


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


def is_compiled(model: nn.Module) -> bool:
    """Whether a module of the model is compiled."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Show the base model of a PEFT model, or of a model with adapters of its own; nothing for any other."""
    if not is_adapted(model):
        yield
        return
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    try:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
    finally:
        for parameter, flag in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)  # both make all of an adapter trainable, its frozen parts, too


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
