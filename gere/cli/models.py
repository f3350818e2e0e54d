"""Models and tokenizers by name, and the texts that a model samples, for the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gere.config import GeReConfig
from gere.errors import ConfigError
from gere.replay.written import own_texts
from gere.session.checkpoint import ANCHOR_FILE, loaded_key


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer; where it has no padding token, the one that ends a text takes its place, here alone.

    Raises:
        ConfigError: If there is none of this name.
    """
    tokenizer = _loaded("--tokenizer", name, lambda: AutoTokenizer.from_pretrained(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def sample(
    name: str, tokenizer: Any, config: GeReConfig, folder: Path, *, device: str | None = None, dtype: str | None = None
) -> list[str]:
    """Sample texts from a base model.

    Args:
        name: Folder or hub name of the model.
        tokenizer: Its tokenizer.
        config: Number, length and sampling.
        folder: Where the texts are kept.
        device: Where it runs; `None` for a GPU if there is one.
        dtype: Its precision; `None` for float32 on a CPU, else that of its files.

    Raises:
        ConfigError: If there is no such model, or it was tuned from another one.
        GeReError: As `own_texts`.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = dtype or ("float32" if place.type == "cpu" else "auto")
    load: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(name, dtype=precision)  # noqa: E731
    model = _loaded("--model", name, load)
    if loaded_key(model) is not None:
        raise ConfigError(
            "This model was tuned from another one, whose anchor its folder names; it is no base model.",
            where=f"--model {name}",
            expected="the base model",
            found=f"a folder with {ANCHOR_FILE}",
            fix=f"Give the base model; to make this model a base of its own, delete {ANCHOR_FILE} from its folder.",
        )
    progress = sys.stderr.isatty()
    return own_texts(model.to(place).eval(), tokenizer, config, folder, progress=progress)


def _loaded(option: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ConfigError(
            "This cannot be loaded.",
            where=f"{option} {name}",
            expected="a folder or hub name that transformers can load",
            found=str(error).splitlines()[0],
            fix="Correct the name, or give a folder on this machine.",
        ) from error
