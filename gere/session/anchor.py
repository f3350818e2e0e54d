"""Which anchor a training belongs to: one that is named, or one that is built from the model itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gere.cache import Anchor, BuildPlan, build_anchor, named_fields, open_named, open_or_build
from gere.cache.base_model import BaseModel
from gere.cache.fingerprint import (
    CONFIG,
    architecture_digest,
    base_tensors,
    config_digest,
    key_of,
    precision_of,
    weights_of,
)
from gere.cache.store import anchor_folder
from gere.config import AUTO, require
from gere.errors import ReplaySetError
from gere.losses.strategy import Strategy, make_strategy
from gere.model.adapters import is_adapted
from gere.model.sharded import whole_shape
from gere.model.states import depth_of
from gere.ranks import Ranks
from gere.replay import ReplaySet
from gere.session.checkpoint import LIVE, named_key
from gere.session.plan import ReplaySettings

# With this many tokens a CPU is at its peak. More in a forward pass only bring padding, masks and memory.
CPU_BATCH_TOKENS = 512


class ReadyModel(NamedTuple):
    """The model as the trainer prepared it.

    Attributes:
        inner: The model without its distributed wrapper, which one process can call alone.
        device: Where it is.
        autocast: Makes the context in which training computes.
        precision: Precision of training, such as `"mixed precision bf16"`.
        ranks: The processes of the run.
    """

    inner: nn.Module
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    precision: str
    ranks: Ranks

    @property
    def dtype(self) -> str:
        """Precision of the weights and of training, as an anchor names it."""
        return f"{precision_of(self.inner)}, {self.precision}"


class Found(NamedTuple):
    """An anchor, and what it was made with.

    Attributes:
        anchor: The anchor.
        strategy: What it keeps of the base model, and how far a row is from that.
        base: The base model as a function of replay rows.
        built: Whether the anchor was built just now.
        tuned: Whether the model has been trained since it was the base model, as far as its files and it know.
    """

    anchor: Anchor
    strategy: Strategy
    base: BaseModel
    built: bool
    tuned: bool


def find_anchor(
    settings: ReplaySettings,
    model: ReadyModel,
    replay: ReplaySet,
    *,
    checkpoint: Path | None,
    progress: bool,
    claim: Callable[[str], None] | None = None,
) -> Found:
    """Open the anchor that the training belongs to, or build it.

    Args:
        settings: What the user asks for.
        model: The model that is about to be trained.
        replay: The replay set.
        checkpoint: The checkpoint that training resumes from. Its weights are loaded, so no anchor can be built.
        progress: Show a progress bar.
        claim: Names the anchor, by its key, in the output folder of the training.

    Raises:
        ConfigError: If the strategy asks for layers that the model lacks, or for a live base that is not there.
        ReplaySetError: If the replay set does not fit the model.
        CacheError: If the anchor is missing, damaged, or belongs to something else.
        RankFailedError: If another process failed.
    """
    config, ranks = settings.config, model.ranks
    _require_fit(model.inner, replay)
    strategy = strategy_of(settings, model)
    base = BaseModel(model.inner, replay.pad_id, model.device, strategy, model.autocast, whole=ranks.lockstep)
    key = named_key(config, settings.reuse, model.inner, checkpoint, ranks)
    fields = {
        "strategy": strategy.field,
        "architecture": architecture_digest(model.inner),
        CONFIG: config_digest(model.inner),
    }
    others = {**replay.fields, **strategy.fields, "dtype": model.dtype}
    # A fine-tuned model has other weights than its base. A live base gives the targets, so it must be the anchor's.
    if key is not None and config.anchor != LIVE:
        if config.anchor == AUTO and checkpoint is None:
            # A tuned model may go on with other settings, if its base was anchored with them.
            base_weights = named_fields(settings.folder, key, ranks)["weights"]
            sibling = key_of({**fields, "weights": base_weights, **others})
            key = sibling if any(ranks.ask(lambda: anchor_folder(settings.folder, sibling).exists())) else key
        anchor = open_named(settings.folder, key, {**fields, **others}, ranks, claim)
        return Found(anchor, strategy, base, built=False, tuned=True)
    weights = weights_of(model.inner, ranks)
    fields = {**fields, "weights": weights.digest, **others}
    if key is not None:
        anchor = open_named(settings.folder, key, fields, ranks, claim)
        return Found(anchor, strategy, base, built=False, tuned=True)
    plan = build_plan(config.anchor_batch_tokens, strategy, model, replay, fields)._replace(sample=weights.sample)
    built = False

    def build(folder: Path, leads: bool) -> None:
        nonlocal built
        built = True
        build_anchor(folder, plan, base, ranks=ranks, leads=leads, progress=progress)

    anchor = open_or_build(
        settings.folder, fields, build, reuse=settings.reuse, sample=weights.sample, ranks=ranks, claim=claim
    )
    return Found(anchor, strategy, base, built, tuned=False)


def strategy_of(settings: ReplaySettings, model: ReadyModel) -> Strategy:
    """The strategy that the settings name, for this model.

    Raises:
        ConfigError: If it asks for layers that the model does not have, or for a live base that is not there.
    """
    live = settings.config.anchor == LIVE
    if live:
        _require_live_base(model.inner)
    return make_strategy(
        settings.config.replay_strategy,
        settings.values,
        depth=depth_of(model.inner),
        live=live,
        half=re.search(r"(bf|fp|float)16", model.dtype) is not None,
    )


def build_plan(
    batch_tokens: int, strategy: Strategy, model: ReadyModel, replay: ReplaySet, fields: Mapping[str, str]
) -> BuildPlan:
    """What is built, in forward passes as long as they pay on the device of the model.

    Args:
        batch_tokens: Padded tokens that one forward pass may have.
        strategy: What is kept.
        model: The model as the trainer prepared it.
        replay: The replay set.
        fields: What the anchor depends on.
    """
    worth = worth_tokens(batch_tokens, model)
    return BuildPlan(fields, replay.rows, strategy, batch_tokens, worth, replay.heldout)


def worth_tokens(batch_tokens: int, model: ReadyModel) -> int:
    """Padded tokens from which on a longer forward pass is no faster on the device of the model."""
    if model.device.type == "cpu":
        return min(batch_tokens, CPU_BATCH_TOKENS)
    return batch_tokens


def _require_live_base(model: nn.Module) -> None:
    require(is_adapted(model), "gere_config.anchor", 'a PEFT model for "live"', type(model).__name__)
    trained = [name for name, tensor in base_tensors(model).items() if tensor.requires_grad]
    what = 'for "live" a base model that stays as it is, since it gives the targets'
    require(not trained, "gere_config.anchor", what, f"training of {', '.join(trained[:3])}")


def _require_fit(model: Any, replay: ReplaySet) -> None:
    """Refuse tokens or lengths that the model has no embedding for, before it fails on the device."""
    vocabulary = whole_shape(model.get_input_embeddings().weight)[0]
    rows = [*replay.rows, *replay.heldout]
    largest, longest = max(map(max, rows)), max(map(len, rows))
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    checks = (
        ("token ids", largest, vocabulary - 1, "Resize the embeddings, or pass the model's own tokenizer."),
        ("tokens in a row", longest, positions, f"Set gere_config.max_length to {positions} or less."),
    )
    for what, found, most, fix in checks:
        if found > most:
            raise ReplaySetError(
                "The replay rows do not fit the model.",
                where=f"{what} of gere_config.replay_dataset",
                expected=f"at most {most}",
                found=found,
                fix=fix,
            )


def precision_name(mixed_precision: str, tf32: bool | None) -> str:
    """Precision of training as an anchor names it.

    Example:
        >>> precision_name("bf16", True)
        'mixed precision bf16, tf32'
    """
    name = f"mixed precision {mixed_precision}"
    return f"{name}, tf32" if tf32 else name
