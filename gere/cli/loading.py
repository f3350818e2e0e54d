"""Model, tokenizer and processes as a training has them, without a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from gere.errors import ConfigError, TokenizerError, UnsupportedSettingError
from gere.model.adapters import refuse_unanchorable


class Prepared(NamedTuple):
    """What a trainer would have.

    Attributes:
        accelerator: Processes and autocast.
        device: Where the model belongs.
        tf32: Whether matrix products of float32 may round to TF32.
    """

    accelerator: Any
    device: torch.device
    tf32: bool


@contextmanager
def prepare(precision: str, *, tf32: bool, cpu: bool) -> Iterator[Prepared]:
    """Set up this process, or all processes that torchrun started, by the rules of the trainer.

    Args:
        precision: Mixed precision: `"no"`, `"bf16"` or `"fp16"`.
        tf32: As in `TrainingArguments`.
        cpu: Use no accelerator.

    Raises:
        ConfigError: If this machine cannot compute so.
        UnsupportedSettingError: If a launcher asks for DeepSpeed or FSDP.
    """
    settings = {"bf16": precision == "bf16", "fp16": precision == "fp16", "use_cpu": cpu, "report_to": []}
    try:
        args = TrainingArguments(output_dir="unused", **settings, **({"tf32": True} if tf32 else {}))
        device = args.device  # sets up the processes
        accelerator = Accelerator(mixed_precision=precision)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            "This machine cannot compute in the precision of the training.",
            where="--precision, --tf32, --device",
            found=f"{type(error).__name__}: {error}",
            fix="Build the anchor on a machine like the one that trains; if that sets use_cpu, say --device cpu.",
        ) from error
    try:
        _refuse_sharding(accelerator)
        yield Prepared(accelerator, device, tf32)
    finally:
        PartialState().destroy_process_group()


def _refuse_sharding(accelerator: Any) -> None:
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise UnsupportedSettingError(
            "The command builds with whole weights in each process.",
            where="accelerate's launcher",
            expected="one process, torchrun, or accelerate launch without DeepSpeed and FSDP",
            found=kind,
            fix="Start it by torchrun, or let the training build the anchor, which has the same key.",
        )


def load_model(name: str, dtype: str | None, device: torch.device) -> Any:
    """Load a causal language model, and move it as the trainer does.

    Args:
        name: Folder or hub name.
        dtype: Precision of the weights; `None` for what `from_pretrained` gives.
        device: Where it belongs; a quantized model stays where `from_pretrained` put it.

    Raises:
        ConfigError: If it cannot be loaded.
        UnsupportedModelError: If it cannot be anchored.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **({} if dtype is None else {"dtype": dtype}))
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded("model", name, error) from error
    refuse_unanchorable(model)
    return model if getattr(model, "is_quantized", False) else model.to(device)


def load_tokenizer(name: str, pad_token: str | None = None) -> Any:
    """Load a tokenizer.

    Args:
        name: Folder or hub name.
        pad_token: Padding token to set, one of the vocabulary; `None` leaves it as it is.

    Raises:
        ConfigError: If it cannot be loaded.
        TokenizerError: If the padding token is not in the vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded("tokenizer", name, error) from error
    if pad_token is not None and pad_token not in tokenizer.get_vocab():
        raise TokenizerError(
            "The padding token is not in the vocabulary.",
            where="--pad-token",
            expected=f"a token of the vocabulary, such as {tokenizer.eos_token!r}",
            found=repr(pad_token),
            fix="Name the token that the training script sets as tokenizer.pad_token.",
        )
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    return tokenizer


def _not_loaded(what: str, name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"The {what} cannot be loaded.",
        where=f"--{what}",
        expected="a folder or hub name for from_pretrained",
        found=f"{name!r}: {type(error).__name__}: {error}",
        fix="Correct the name; without a network, give the folder.",
    )
