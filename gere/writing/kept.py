"""The base model as the source of its own replay texts: sampled once, before it is trained, and kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from gere.cache import refuse_other_base
from gere.cache.files import sha256
from gere.cache.fingerprint import architecture_digest, weights_digest
from gere.cache.replay_files import KeptTexts, find_texts, keep_texts, manifests_in, open_texts
from gere.config import GeReConfig
from gere.errors import CacheMismatchError, CacheMissingError, UnsupportedSettingError
from gere.ranks import ALONE, Ranks
from gere.replay import HUB_SIZE, adds_bos, private_copy, require_tokenizer, tokenizer_digest
from gere.sharded import is_sharded
from gere.writing.drawing import draw
from gere.writing.sampling import TextSampler, prompt_of

METHOD = "1"  # raised when the same settings would give other texts
logger = logging.getLogger("gere")


def base_texts(
    model: nn.Module,
    tokenizer: Any,
    config: GeReConfig,
    folder: Path,
    *,
    reuse: bool = True,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> list[str]:
    """Texts of a base model: opened if they are kept, else sampled and kept; the same on every rank.

    Args:
        model: The base model as it stands, with or without an adapter that is disabled, without a distributed wrapper.
        tokenizer: The user's tokenizer.
        config: Number, length and sampling.
        folder: Cache folder.
        reuse: Refuse a folder whose anchors belong to other weights, before a trained model is taken for a base.
        ranks: All processes; each must call this.
        progress: Show a progress bar.

    Raises:
        ReplaySetError: If the model gives too few usable texts.
        UnsupportedSettingError: If its weights are spread over processes.
        TokenizerError: If the tokenizer lacks what a text begins with.
        CacheError: If the kept texts are damaged, the folder cannot be written, or its anchors are another model's.
        RankFailedError: If another process failed.
    """
    ranks.together(lambda: _require_usable(model, tokenizer, config))
    fields = text_fields(model, tokenizer, config, ranks)
    on_disks = ranks.ask(lambda: open_texts(folder, fields))
    kept = next((found for found in on_disks if found is not None), None)
    if kept is not None:
        return kept.texts
    ranks.together(lambda: refuse_other_base(folder, fields["weights"]) if reuse else None)
    sampler = ranks.together(lambda: TextSampler(model, tokenizer, config))
    sieve = draw(sampler.batch, _size(config), ranks, progress=progress)
    written = ranks.together(
        lambda: keep_texts(folder, fields, sieve.texts, sieve.counts) if ranks.first_here else None
    )
    if ranks.index == 0:
        logger.info("The base model wrote its replay texts, %s: %s", written, sieve)
    return sieve.texts


def anchored_texts(digest: str, config: GeReConfig, folder: Path, ranks: Ranks = ALONE) -> list[str]:
    """Texts that an anchor was made from, for a model that has been trained since: it is never sampled again.

    Args:
        digest: `text_digest` of the texts, from the manifest of the anchor.
        config: Number, length and sampling, which must be those of the texts.
        folder: Cache folder.
        ranks: All processes; each must call this.

    Raises:
        CacheMissingError: If no process has them.
        CacheMismatchError: If they were sampled by other settings.
        CacheCorruptError: If a byte of them differs from what was written.
    """
    found = next((kept for kept in ranks.ask(lambda: find_texts(folder, digest)) if kept is not None), None)
    if found is None:
        raise CacheMissingError(
            "The texts that the base model wrote for this run are not in the cache folder, and a trained model must "
            "not write them again.",
            where=folder,
            expected=f"replay-KEY.json and replay-KEY.jsonl whose texts have the digest {digest}",
            found=", ".join(path.name for path in manifests_in(folder)) or "no texts that a model wrote",
            fix="Copy both files from the folder of the first run, or make them again by one step from the base model "
            "with the same settings. If the anchor is one of other texts, set gere_config.replay_dataset to those.",
        )
    _require_same(found, config)
    return found.texts


def text_fields(model: nn.Module, tokenizer: Any, config: GeReConfig, ranks: Ranks = ALONE) -> dict[str, str]:
    """All that the texts of a base model depend on.

    Args:
        model: The base model.
        tokenizer: The user's tokenizer.
        config: Number, length and sampling.
        ranks: All processes; each must call this.
    """
    chat = prompt_of(tokenizer, config) == "chat"
    return {
        **_settings(config),
        "method": METHOD,
        "prompt": prompt_of(tokenizer, config),
        "chat_template": sha256(str(tokenizer.chat_template).encode()) if chat else "",
        "begins_with_bos": str(adds_bos(private_copy(tokenizer), config)),
        "tokenizer": tokenizer_digest(tokenizer),
        "architecture": architecture_digest(model),
        "weights": weights_digest(model, ranks),
    }


def _settings(config: GeReConfig) -> dict[str, str]:
    return {
        "size": str(_size(config)),
        "max_length": str(config.max_length),
        "temperature": f"{config.self_temperature:g}",
        "top_p": f"{config.self_top_p:g}",
        "batch_size": str(config.self_batch_size),
        "seed": str(config.self_seed),
    }


def _size(config: GeReConfig) -> int:
    return config.replay_size or HUB_SIZE


def _require_usable(model: nn.Module, tokenizer: Any, config: GeReConfig) -> None:
    require_tokenizer(config, tokenizer)
    if is_sharded(model):
        raise UnsupportedSettingError(
            "A model whose weights are spread over processes cannot write its replay texts.",
            where='gere_config.replay_dataset="self"',
            expected="a model that each process holds whole until it is wrapped",
            found="weights of DeepSpeed ZeRO-3 or FSDP2",
            fix="Write the texts first by `gere replay --source self --model MODEL --out replay.jsonl`, and set "
            "gere_config.replay_dataset to that file.",
        )


def _require_same(kept: KeptTexts, config: GeReConfig) -> None:
    """Refuse kept texts that other settings gave."""
    wanted = _settings(config) | ({} if config.self_prompt == "auto" else {"prompt": config.self_prompt})
    names = tuple(name for name in wanted if kept.fields.get(name) != wanted[name])
    if names:
        error = CacheMismatchError(
            f"The base model wrote the texts of this run by another {', '.join(names)}.",
            where=kept.path,
            expected="; ".join(f"{name} {wanted[name]}" for name in names) + " (this run)",
            found="; ".join(f"{name} {kept.fields.get(name)}" for name in names) + " (the texts)",
            fix="Restore the setting; a trained model cannot write other texts.",
        )
        error.fields = names
        raise error
