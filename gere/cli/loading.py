"""Load a model and a tokenizer as a training script does, with errors that name the option."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gere.errors import ConfigError, TokenizerError
from gere.model.adapters import refuse_unanchorable
from gere.model.loading import load_pretrained

# How transformers names classes of models that read more than text. Of some, AutoModelForCausalLM loads the text part.
WITH_OTHER_INPUTS = ("ForConditionalGeneration", "ForVisionText2Text")


def measuring_device(name: str | None, dtype: str | None) -> tuple[torch.device, str]:
    """Return the device of `--device`, by default a GPU if there is one, and the precision of a model there.

    Raises:
        ConfigError: If there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "There is no such device.",
            where="--device",
            expected="cpu, or a device that this PyTorch reaches, such as cuda or cuda:1",
            found=f"{name!r}: {str(error).splitlines()[0]}",
            fix="Correct the device, or leave it out.",
        ) from error
    return device, dtype or {"cpu": "float32"}.get(device.type, "auto")


def load_model(name: str, dtype: str | None, device: torch.device, option: str = "--model") -> Any:
    """Load a language model that can be anchored, by the class that it was saved from; move it as the trainer does.

    `dtype` is the precision of the weights; `None` takes what `from_pretrained` gives. An error names `option`.
    """
    model = load_pretrained(_class_of(name), "model", option, name, dtype=dtype)
    refuse_unanchorable(model)
    # `from_pretrained` has put a quantized model on its device, and `Trainer` does not move it either.
    if getattr(model, "is_quantized", False):
        return model
    return model.to(device)


def _class_of(name: str) -> Any:
    """Return the class that a training loads a model by: that of its file, if it reads more than text."""
    try:
        saved = (AutoConfig.from_pretrained(name).architectures or [""])[0]
    except (OSError, ValueError):
        saved = ""  # loading says what is wrong
    if saved.endswith(WITH_OTHER_INPUTS) and hasattr(transformers, saved):
        return getattr(transformers, saved)
    return AutoModelForCausalLM


def load_tokenizer(name: str, pad_token: str | None = None, option: str = "--tokenizer") -> Any:
    """Load a tokenizer, and set its padding token if one is given."""
    tokenizer = load_pretrained(AutoTokenizer, "tokenizer", option, name)
    if pad_token is None:
        return tokenizer
    if pad_token not in tokenizer.get_vocab():
        raise TokenizerError(
            "The padding token is not in the vocabulary.",
            where="--pad-token",
            expected=f"a token of the vocabulary, such as {tokenizer.eos_token!r}",
            found=repr(pad_token),
            fix="Name the token that the training script sets as tokenizer.pad_token.",
        )
    tokenizer.pad_token = pad_token
    return tokenizer
