"""Models and trainers of a sequence: loaded from the base or a saved task; plain, with replay, or the user's own."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from gere.config import kwargs_of_section, require
from gere.continual.settings import SequenceSettings, require_name
from gere.errors import ConfigError, TokenizerError, UnsupportedSettingError
from gere.trainer import GeReTrainer

TrainerFactory = Callable[..., Trainer]
CONFIG = "gere_config"
DEFAULTS: Mapping[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_steps": 10, "save_total_limit": 2}


def plain_trainer(model: Any, tokenizer: Any, train_rows: Sequence[Any], args: Any, **settings: Any) -> Trainer:
    """Make the plain `Trainer` over encoded rows."""
    return Trainer(**_shared(model, tokenizer, train_rows, args), **settings)


def gere_trainer(model: Any, tokenizer: Any, train_rows: Sequence[Any], args: Any, **settings: Any) -> Trainer:
    """Make a `GeReTrainer` over encoded rows; `settings` are its replay arguments."""
    return GeReTrainer(**_shared(model, tokenizer, train_rows, args), **settings)


def _shared(model: Any, tokenizer: Any, train_rows: Sequence[Any], args: Any) -> dict[str, Any]:
    return {
        "model": model,
        "args": args,
        "train_dataset": train_rows,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "processing_class": tokenizer,
    }


def factory_of(settings: SequenceSettings) -> TrainerFactory:
    """Find the factory that `trainer` names.

    Raises:
        ConfigError: If the user's own module or function cannot be imported.
    """
    known = {"plain": plain_trainer, "gere": gere_trainer}
    if settings.trainer in known:
        return known[settings.trainer]
    module, _, name = settings.trainer.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "The trainer factory cannot be imported.",
            where="trainer",
            expected="module:function of a module that Python can import",
            found=f"{settings.trainer!r}: {type(error).__name__}: {error}",
            fix="Correct the name; for a module in this folder, start with PYTHONPATH=. before the command.",
        ) from error


def factory_settings(settings: SequenceSettings, out: Path) -> dict[str, Any]:
    """Collect the keyword arguments of the factory: those of the section `gere`, and those of `settings`.

    Args:
        settings: Settings of the sequence.
        out: Run folder, where the anchor is by default.

    Raises:
        ConfigError: If a replay setting is unknown or cannot be used.
    """
    if settings.trainer != "gere" and not settings.gere:
        return dict(settings.settings)
    nested = settings.gere.get(CONFIG) or {}
    require(isinstance(nested, Mapping), f"gere.{CONFIG}", "settings by name", nested)
    section = {name: value for name, value in settings.gere.items() if name != CONFIG} | dict(nested)
    replay = kwargs_of_section(section, "gere")
    return {"gere_hidden_state_saving_dir": str(out / "gere_saving"), **replay, **settings.settings}


def training_arguments(settings: SequenceSettings, folder: Path, task: int = 0) -> TrainingArguments:
    """Make the `TrainingArguments` of one task.

    Args:
        settings: Settings of the sequence.
        folder: Folder of its checkpoints.
        task: Index of the task.

    Raises:
        ConfigError: If a name is unknown or belongs to the sequence, or a value cannot be used.
        UnsupportedSettingError: If training would run in several processes or on several GPUs.
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in settings.training:
        require_name(name, known, "training")
    taken = [name for name in ("output_dir", "seed", "save_only_model") if name in settings.training]
    require(not taken, "training", "out and seed beside it, and checkpoints to resume from", ", ".join(taken))
    given = {name: _as_number(name, value) for name, value in settings.training.items()}
    saves = {"save_strategy": "steps" if "save_steps" in given else "no"}
    base = given.get("data_seed")
    if base is None:
        base = settings.seed
    # With one order for all tasks, each would replay the same first rows, and the model would learn these by heart.
    seeds = {"seed": settings.seed, "data_seed": order_seed(base, task)}
    try:
        args = TrainingArguments(output_dir=str(folder), **{**DEFAULTS, **saves, **given, **seeds})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "TrainingArguments does not accept the training settings.",
            where="training",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the value.",
        ) from error
    if args.world_size > 1 or args.n_gpu > 1:
        raise UnsupportedSettingError(
            "A sequence runs in one process, on one device.",
            where="the launcher, or CUDA_VISIBLE_DEVICES",
            expected="one process that sees one GPU at most",
            found=f"{args.world_size} processes, {args.n_gpu} GPUs",
            fix="Start `gere sequence` without a launcher and with CUDA_VISIBLE_DEVICES=0; other seeds on other GPUs.",
        )
    return args


def order_seed(seed: int, task: int) -> int:
    """Seed of the order of rows in a task, 32 bits. Neighbouring seeds and tasks get unrelated orders."""
    return int(np.random.SeedSequence([seed, task]).generate_state(1)[0])


def _as_number(name: str, value: Any) -> Any:
    """Read a number that YAML takes for text, such as 1e-4."""
    if isinstance(value, str) and get_type_hints(TrainingArguments).get(name) is float:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model. If it has no padding token, its EOS token pads.

    Raises:
        ConfigError: If it cannot be loaded.
        TokenizerError: If it has no EOS token.
    """
    tokenizer = _loaded(name, lambda: AutoTokenizer.from_pretrained(name))
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "The tokenizer has no token that ends an answer.",
            where=name,
            expected="an eos_token",
            fix="Save a tokenizer with eos_token beside the model.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: SequenceSettings, saved: Path | None) -> Any:
    """Load the base model, or the model after a task.

    Args:
        settings: Settings of the sequence.
        saved: Folder of that model, or with LoRA of its adapter; `None` for the base.

    Raises:
        ConfigError: If a model cannot be loaded, or a setting of LoRA cannot be used.
    """
    # The adapter of a task lies on the base, which never moves.
    name = settings.model if saved is None or settings.lora is not None else str(saved)
    model: Any = _loaded(name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=settings.dtype))
    most = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    require(settings.max_length <= most, "max_length", f"at most {most}, which the model has", settings.max_length)
    if settings.lora is None:
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    if saved is not None:
        return PeftModel.from_pretrained(model, str(saved), is_trainable=True)
    try:
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **settings.lora}))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "The adapter cannot be made.",
            where="lora",
            expected="arguments of peft.LoraConfig, such as r, lora_alpha, target_modules",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the section.",
        ) from error


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            "The model or its tokenizer cannot be loaded.",
            where="model",
            expected="a folder or hub name for from_pretrained",
            found=f"{name!r}: {type(error).__name__}: {error}",
            fix="Correct the name; without a network, give the folder.",
        ) from error
