"""PEFT adapters: reach the base model inside, and refuse adapters that cannot be anchored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gere.errors import UnsupportedModelError

SHIFTING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_unanchorable(model: nn.Module) -> None:
    """Raise an `UnsupportedModelError` for a model whose states cannot be anchored, before anything is built.

    These are encoder-decoders, models without a language head, virtual tokens, and adapters that moved base weights.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "Replay needs a decoder-only language model.",
            where=type(model).__name__,
            expected="config.is_encoder_decoder = False",
            found="an encoder-decoder model",
            fix="Train a causal language model, or use the plain Trainer for this one.",
        )
    if head_of(model) is None:
        raise _without_head(base_module(model))
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
                "The adapter was initialised by moving a part of the base weights into it. The model with its adapter "
                "disabled is not the base model.",
                where=f"adapter {name!r}",
                expected="init_lora_weights that leaves the base weights alone, such as True or 'gaussian'",
                found=repr(init),
                fix="Use the default initialisation.",
            )


def _without_head(model: nn.Module) -> UnsupportedModelError:
    """Say which part of the model, or which other setting, would work."""
    inside = (
        f"{type(module).__name__} at .{name}"
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and head_of(module) is not None
    )
    found = next(inside, None)
    if found is None:
        ways = "Load a language model, such as by AutoModelForCausalLM"
    else:
        ways = "Give the trainer the language model inside"
    return UnsupportedModelError(
        "The model has no language head, so that it cannot predict the next token of a replay text.",
        where=type(model).__name__,
        expected="a causal language model, whose get_output_embeddings() gives its head",
        found=found or "none, as in classifiers, reward models and embedding models",
        fix=f'{ways}; or set gere_config=GeReConfig(replay_strategy="none", base_decay=0.7), which needs no head.',
    )


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the language head of a model; `None` if it has none."""
    head = getattr(base_module(model), "get_output_embeddings", None)
    return head() if callable(head) else None


def base_module(model: nn.Module) -> nn.Module:
    """Return the causal language model inside PEFT; `model` has no distributed wrapper."""
    inner = getattr(model, "get_base_model", None)
    if callable(inner):
        return inner()  # type: ignore[no-any-return]
    return model


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model carries PEFT adapters, so that its base is still there."""
    # Adapters can be loaded without PeftModel, by transformers' own `add_adapter`.
    return hasattr(model, "disable_adapter") or bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Show the base model of a model with adapters; do nothing for other models."""
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
        # PEFT and transformers make all of an adapter trainable when they enable it, frozen parts included.
        for parameter, flag in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)
