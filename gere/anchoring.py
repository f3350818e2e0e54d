"""Which anchor a run belongs to: named by the user, a checkpoint or a loaded model, or built from the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gere.base_model import BaseModel
from gere.cache import (
    Anchor,
    BandRule,
    BuildPlan,
    Likeliest,
    Live,
    Losses,
    MeanStd,
    Quantiles,
    Regions,
    States,
    Target,
    build_anchor,
    named_fields,
    open_named,
    open_or_build,
)
from gere.cache.files import canonical_json, folder_errors, write_atomic
from gere.cache.fingerprint import architecture_digest, base_tensors, precision_of, weights_digest
from gere.config import GeReConfig, parse_layers, require
from gere.errors import CacheCorruptError, CacheMissingError, ConfigError, ReplaySetError
from gere.ranks import Ranks
from gere.replay import ReplaySet
from gere.sharded import whole_shape
from gere.states import depth_of, is_adapted

ANCHOR_FILE = "gere_anchor.json"
LIVE = "live"
# A CPU is at its peak with so few tokens, and more in a forward pass only bring padding, masks and memory.
CPU_BATCH_TOKENS = 512


class ReadyModel(NamedTuple):
    """The model as the trainer prepared it.

    Attributes:
        inner: The model without its distributed wrapper, which one process can call alone.
        device: Where it is.
        autocast: Makes the context in which training computes.
        precision: Precision of training, such as `"mixed precision bf16"`.
        fresh: Whether the trainer made the model anew for this training.
        ranks: The processes of the run.
        joins: Whether replay rows may go along in a call for task rows.
    """

    inner: nn.Module
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    precision: str
    fresh: bool
    ranks: Ranks
    joins: bool = False


class AnchorWish(NamedTuple):
    """What the user asked for.

    Attributes:
        folder: Cache folder.
        reuse: Open an anchor that is there.
        config: All other settings.
        checkpoint: The checkpoint that training resumes from.
    """

    folder: Path
    reuse: bool
    config: GeReConfig
    checkpoint: Path | None


def find_anchor(wish: AnchorWish, model: ReadyModel, replay: ReplaySet, *, resumed: bool, progress: bool) -> Anchor:
    """Open the anchor that the run belongs to, or build it.

    Args:
        wish: What the user asked for.
        model: The model that is about to be trained.
        replay: The replay set.
        resumed: Whether the weights come from a checkpoint.
        progress: Show a progress bar.

    Raises:
        ReplaySetError: If the replay set does not fit the model.
        CacheError: If the anchor is missing, damaged, or belongs to something else.
        RankFailedError: If another process failed.
    """
    _require_fit(model.inner, replay)
    key = model.ranks.ask(lambda: _named_key(wish, model.inner, resumed))[0]
    moved = key is not None and wish.config.anchor != LIVE  # a live base gives targets, so it must be the anchor's
    fields = _fields(wish.config, model, replay, weights_moved=moved)
    if key is not None:
        return open_named(wish.folder, key, fields, model.ranks)
    if resumed:
        raise _names_none(wish)

    def build(folder: Path, leads: bool) -> None:
        base = base_model(wish.config, model, replay)
        plan = build_plan(wish.config, model, replay, fields)
        build_anchor(folder, plan, base, ranks=model.ranks, leads=leads, progress=progress)

    return open_or_build(wish.folder, fields, build, reuse=wish.reuse, ranks=model.ranks)


def build_plan(config: GeReConfig, model: ReadyModel, replay: ReplaySet, fields: Mapping[str, str]) -> BuildPlan:
    """What is built, in forward passes as long as they are worth on the device of the model.

    Args:
        config: All settings.
        model: The model as the trainer prepared it.
        replay: The replay set.
        fields: What the anchor depends on.
    """
    most = config.anchor_batch_tokens
    worth = min(most, CPU_BATCH_TOKENS) if model.device.type == "cpu" else most
    return BuildPlan(fields, replay.rows, target_of(config, model.inner), most, worth)


def base_model(config: GeReConfig, model: ReadyModel, replay: ReplaySet) -> BaseModel:
    """The base model as a function of replay rows."""
    target = target_of(config, model.inner)
    return BaseModel(model.inner, replay.pad_id, model.device, target, model.autocast, whole=model.ranks.lockstep)


def target_of(config: GeReConfig, model: nn.Module) -> Target:
    """What the strategy keeps of the base model.

    Raises:
        ConfigError: If it asks for layers that the model does not have, or for a live base that is not there.
    """
    depth = depth_of(model)
    target: Target = Losses()
    if config.replay_strategy == "tm":
        layers = parse_layers(config.layers, depth)
        target = Regions(layers, depth, [_rule(config, layer == depth) for layer in layers])
    elif config.replay_strategy in ("l1", "l2"):
        target = States(depth)
    elif config.replay_strategy == "kl":
        target = Likeliest(config.kl_top_k, config.kl_temperature)
    if config.anchor != LIVE:
        return target
    require(is_adapted(model), "gere_config.anchor", 'a PEFT model for "live"', type(model).__name__)
    trained = [name for name, tensor in base_tensors(model).items() if tensor.requires_grad]
    what = 'for "live" a base model that stays as it is, since it gives the targets'
    require(not trained, "gere_config.anchor", what, f"training of {', '.join(trained[:3])}")
    return Live(target)


def _rule(config: GeReConfig, is_last: bool) -> BandRule:
    if is_last and config.bands == "mean_std":
        return MeanStd(config.band_width, config.std_floor)
    return Quantiles(config.lower_quantile, config.upper_quantile)


def texts_of_anchor(wish: AnchorWish, model: nn.Module, ranks: Ranks, *, resumed: bool) -> str | None:
    """Digest of the texts of the anchor that the run belongs to; `None` if the model is still its own base.

    Args:
        wish: What the user asked for.
        model: The model without its distributed wrapper.
        ranks: All processes; each must call this.
        resumed: Whether the weights come from a checkpoint.

    Raises:
        CacheError: If the anchor is missing or damaged.
        RankFailedError: If another process failed.
    """
    key = ranks.ask(lambda: _named_key(wish, model, resumed))[0]
    if key is not None:
        return named_fields(wish.folder, key, ranks)["texts"]
    if resumed:
        raise _names_none(wish)
    return None


def _names_none(wish: AnchorWish) -> CacheMissingError:
    return CacheMissingError(
        "Training resumes from a checkpoint that names no anchor, and its model cannot be anchored any more.",
        where=wish.checkpoint,
        expected=f"{ANCHOR_FILE}, which GeReTrainer writes into every checkpoint",
        found="a checkpoint of another trainer, or of GeReTrainer without replay",
        fix="Start from the base model, or set gere_config.anchor to the key of its anchor.",
    )


def _named_key(wish: AnchorWish, model: nn.Module, resumed: bool) -> str | None:
    """Key that the user, the checkpoint or the folder of the loaded model names."""
    if wish.config.anchor not in ("auto", LIVE):
        return wish.config.anchor.removeprefix("anchor-")
    if resumed:
        return read_key(wish.checkpoint)
    key = loaded_key(model)
    if key is not None and not wish.reuse:
        raise ConfigError(
            "This model was tuned from another one, whose anchor its folder names; it would become a base itself.",
            where="reuse_gere_hidden_state",
            expected=f"True, to use the anchor {key}",
            found="False",
            fix=f"Leave it out; or, to make this model a base of its own, delete {ANCHOR_FILE} from its folder.",
        )
    return key


def _fields(config: GeReConfig, model: ReadyModel, replay: ReplaySet, *, weights_moved: bool) -> dict[str, str]:
    """What the anchor depends on, in the order in which a difference is reported."""
    target = target_of(config, model.inner)
    weights = {} if weights_moved else {"weights": weights_digest(model.inner, model.ranks)}
    return {
        "strategy": target.field,
        "architecture": architecture_digest(model.inner),
        **weights,
        **replay.fields,
        **target.fields,
        "dtype": f"{precision_of(model.inner)}, {model.precision}",
    }


def _require_fit(model: Any, replay: ReplaySet) -> None:
    """Refuse tokens or lengths that the model has no embedding for, before it fails on the device."""
    vocabulary = whole_shape(model.get_input_embeddings().weight)[0]
    largest, longest = max(map(max, replay.rows)), max(map(len, replay.rows))
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


def write_key(folder: Path, key: str) -> None:
    """Write the key of the anchor beside a saved model."""
    with folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)  # with sharded checkpoints the trainer has not made it yet
    write_atomic(folder / ANCHOR_FILE, canonical_json({"format_version": 1, "anchor": key}))


def loaded_key(model: Any) -> str | None:
    """Key in the folder that a model was loaded from."""
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", "")
    return read_key(Path(loaded_from)) if loaded_from else None


def read_key(folder: Path | None) -> str | None:
    """Key in the anchor file of a checkpoint or model folder; `None` if there is no such file."""
    path = folder / ANCHOR_FILE if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["anchor"])
    except (ValueError, KeyError, TypeError) as error:
        raise CacheCorruptError(
            "The file that names the anchor cannot be read.",
            where=path,
            expected='a JSON object with the key "anchor"',
            found=f"{type(error).__name__}: {error}",
            fix="Restore the file, or set gere_config.anchor to the key of the anchor.",
        ) from error


def precision_name(mixed_precision: str, tf32: bool | None) -> str:
    """Precision of training as an anchor names it.

    Example:
        >>> precision_name("bf16", True)
        'mixed precision bf16, tf32'
    """
    return f"mixed precision {mixed_precision}{', tf32' if tf32 else ''}"
