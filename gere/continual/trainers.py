"""Models and trainers of a sequence: loaded from the base or a saved task; plain, with replay, or the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from gere.config import kwargs_of_section, require
from gere.continual.settings import SequenceSettings, require_name
from gere.errors import ConfigError, MissingPackageError, TokenizerError, UnsupportedSettingError
from gere.kif import RecurrentKIFTrainer, recurrent_kif_trainer
from gere.kif.config import kif_config_of
from gere.model.loading import load_pretrained
from gere.trainer import GeReTrainer

PRETRAINED = "model or its tokenizer"

# Called as `factory(model, tokenizer, train_rows, args, **settings)`.
TrainerFactory = Callable[..., Trainer]
# Two checkpoints: the last one may be cut by a kill, or be that of the last step, which cannot be resumed.
DEFAULTS: Mapping[str, Any] = {
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 10,
    "save_strategy": "no",
    "save_total_limit": 2,
}


def _factory(cls: type[Trainer]) -> TrainerFactory:
    """Make a factory of trainers of a class over encoded rows; further settings are arguments of the class."""

    def make(model: Any, tokenizer: Any, train_rows: Sequence[Any], args: Any, **settings: Any) -> Trainer:
        collator = DataCollatorForSeq2Seq(tokenizer)
        return cls(model, args, collator, train_rows, processing_class=tokenizer, **settings)

    return make


plain_trainer, gere_trainer = _factory(Trainer), _factory(GeReTrainer)
kif_trainer, kif_gere_trainer = _factory(RecurrentKIFTrainer), _factory(recurrent_kif_trainer(GeReTrainer))


def factory_of(settings: SequenceSettings) -> TrainerFactory:
    """Find the factory that `trainer` names."""
    known = {"plain": plain_trainer, "gere": gere_trainer, "kif": kif_gere_trainer if settings.gere else kif_trainer}
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
    """Collect the keyword arguments of the factory: of the sections `gere` and `kif`, and those of `settings`.

    The anchor is in the run folder `out` by default, and nothing is held out where `general` names texts.
    """
    own = dict(settings.settings)
    if settings.uses_kif:
        own["kif_config"] = kif_config_of(settings.kif, "kif")
    if settings.trainer != "gere" and not settings.gere:
        return own
    section = settings.gere
    if settings.general is not None:
        # The sequence measures texts of its own. Two general losses in one log would be of different texts.
        section = {"replay_heldout": 0, **section}
    replay = kwargs_of_section(section, "gere")
    return {"gere_hidden_state_saving_dir": str(out / "gere_saving"), **replay, **own}


def training_arguments(settings: SequenceSettings, folder: Path, task: int = 0) -> TrainingArguments:
    """Make the `TrainingArguments` of the task with this index, whose checkpoints are in `folder`."""
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in settings.training:
        require_name(name, known, "training")
    # `save_only_model` leaves the optimizer out, so that a checkpoint could not be resumed.
    taken = [name for name in ("output_dir", "seed", "save_only_model") if name in settings.training]
    require(not taken, "training", "out and seed beside it, and checkpoints to resume from", ", ".join(taken))
    given = {name: _as_number(name, value) for name, value in settings.training.items() if value is not None}
    if "save_steps" in given:
        given.setdefault("save_strategy", "steps")
    base = given.get("data_seed")
    if base is None:
        base = settings.seed
    given["seed"] = settings.seed
    # With one order for all tasks, each would replay the same first rows, and the model would learn these by heart.
    given["data_seed"] = order_seed(base, task)
    try:
        args = TrainingArguments(output_dir=str(folder), **{**DEFAULTS, **given})
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
    """Compute the seed of the order of rows in a task, 32 bits."""
    # Seed 1 of task 0 is not seed 0 of task 1, as it would be with a sum.
    return int(np.random.SeedSequence([seed, task]).generate_state(1)[0])


def _as_number(name: str, value: Any) -> Any:
    """Read a float that stands as text; refuse what is no number where only numbers are taken."""
    hint = get_type_hints(TrainingArguments).get(name)
    kinds = {*(get_args(hint) or (hint,))} - {type(None)}
    # YAML 1.1 wants a dot in a number: it reads 1e-4 as text.
    if isinstance(value, str) and float in kinds:
        with contextlib.suppress(ValueError):
            value = float(value)
    if kinds <= {int, float, bool}:
        whole = isinstance(value, int) or (isinstance(value, float) and float in kinds)
        expected = " or ".join(sorted(kind.__name__ for kind in kinds))
        require(whole and (isinstance(value, bool) <= (bool in kinds)), f"training.{name}", expected, value)
        # The data loader would refuse it, far from here.
        require(value >= 1 or not name.endswith("batch_size"), f"training.{name}", "1 or more", value)
    return value


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model. If it has no padding token, its EOS token pads."""
    tokenizer = load_pretrained(AutoTokenizer, PRETRAINED, "model", name)
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


def is_encoder_decoder(settings: SequenceSettings) -> bool:
    """Tell whether the model reads the prompt in an encoder, and writes the answer in a decoder."""
    config = load_pretrained(AutoConfig, PRETRAINED, "model", settings.model)
    return bool(getattr(config, "is_encoder_decoder", False))


def load_model(settings: SequenceSettings, saved: Path | None) -> Any:
    """Load the base model, or the model after a task from its folder, which with LoRA holds the adapter."""
    name = settings.model
    # The adapter of a task lies on the base, which never moves.
    if saved is not None and settings.lora is None:
        name = str(saved)
    encodes = is_encoder_decoder(settings)
    model = load_pretrained(
        AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM, PRETRAINED, "model", name, dtype=settings.dtype
    )
    if encodes:
        # T5 takes the count of tokens in a step by **kwargs, and still gives the mean over the tokens of a batch.
        model.accepts_loss_kwargs = False
    most = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    require(settings.max_length <= most, "max_length", f"at most {most}, which the model has", settings.max_length)
    if settings.lora is None:
        return model
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise MissingPackageError(
            "An adapter is to be trained, and the package for it cannot be imported.",
            where="lora",
            expected="package peft",
            found=error,
            fix='pip install "gere[peft]"',
        ) from error
    if saved is not None:
        # By default PEFT loads an adapter for inference, with frozen weights.
        return PeftModel.from_pretrained(model, str(saved), is_trainable=True)
    try:
        kind = "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM"
        return get_peft_model(model, LoraConfig(**{"task_type": kind, **settings.lora}))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "The adapter cannot be made.",
            where="lora",
            expected="arguments of peft.LoraConfig, such as r, lora_alpha, target_modules",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the section.",
        ) from error
