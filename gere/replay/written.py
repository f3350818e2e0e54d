"""Texts that the base model writes for its own replay: sampled once, before it is trained, and kept in a file.

The file is `replay-self-KEY.jsonl` beside the anchors. Its key follows from the base model, the tokenizer and the
settings of the sampling, so that a fine-tuned model finds the texts of its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gere._files import canonical_json, sha256
from gere._log import logger
from gere.cache.fingerprint import architecture_digest, weights_digest
from gere.config import GeReConfig
from gere.errors import CacheMissingError, UnsupportedSettingError
from gere.model.sharded import is_sharded
from gere.ranks import ALONE, Ranks
from gere.replay.kept import read_kept, write_kept
from gere.replay.rows import adds_bos, private_copy, require_tokenizer, tokenizer_digest
from gere.replay.sampling import TextSampler, prompt_of
from gere.replay.sieve import draw
from gere.replay.texts import HUB_SIZE

METHOD = "2"  # raised when the same settings would give other texts


def own_texts(
    model: nn.Module,
    tokenizer: Any,
    config: GeReConfig,
    folder: Path,
    *,
    base_weights: str | None = None,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> list[str]:
    """Read the texts of the base model from `folder`, or sample and keep them. Every rank must call this.

    `model` has no distributed wrapper. `base_weights` is the digest of the base model's weights, for a model that was
    fine-tuned since: it finds the texts of its base, and raises `CacheMissingError` in place of sampling.
    """
    ranks.together(lambda: _require_usable(model, tokenizer, config))
    # Fine-tuning moves the weights and leaves the architecture.
    base = f"{architecture_digest(model)} {base_weights or weights_digest(model, ranks)}"
    path = folder / f"replay-self-{_key(tokenizer, config, base)}.jsonl"
    # Machines may have disks of their own, and the texts on one of them.
    for kept in ranks.ask(lambda: _read(path, config, ranks)):
        if kept:
            return kept
    if base_weights is not None:
        others = sorted(other.name for other in folder.glob("replay-self-*.jsonl"))
        raise CacheMissingError(
            "The texts that the base model wrote for this run are not in the cache folder, and a fine-tuned model "
            "must not write them again.",
            where=folder,
            expected=path.name,
            found=", ".join(others) or "no texts of a model",
            fix="Restore the settings of the sampling, copy the file from the folder of the first run, or make it "
            "again by one step from the base model with the same settings.",
        )
    sampler = ranks.together(lambda: TextSampler(model, tokenizer, config))
    sieve = draw(sampler.batch, _size(config), ranks, progress=progress)
    ranks.together(lambda: _keep(path, sieve.texts, ranks))
    if ranks.index == 0:
        logger.info("The base model wrote its replay texts, %s: %s", path, sieve)
    return sieve.texts


def _key(tokenizer: Any, config: GeReConfig, base: str) -> str:
    """Digest all that the texts follow from, as 16 hexadecimal digits."""
    content = {
        "method": METHOD,
        "base": base,
        "tokenizer": tokenizer_digest(tokenizer),
        "begins_with_bos": adds_bos(private_copy(tokenizer), config),
        "chat_template": "",
        "size": _size(config),
        "max_length": config.max_length,
        "temperature": config.self_temperature,
        "top_p": config.self_top_p,
        "batch_size": config.self_batch_size,
        "seed": config.self_seed,
    }
    # A template that is not used does not shape the texts.
    if prompt_of(tokenizer, config) == "chat":
        content["chat_template"] = str(getattr(tokenizer, "chat_template", None))
    return sha256(canonical_json(content))[:16]


def _size(config: GeReConfig) -> int:
    return config.replay_size or HUB_SIZE


def _read(path: Path, config: GeReConfig, ranks: Ranks) -> list[str] | None:
    """Read the kept texts, once on each machine; `None` if there is no file."""
    if not ranks.first_here or not path.is_file():
        return None
    fix = "Restore the file; or delete it, and start from the base model, which writes the same texts again."
    return [record["text"] for record in read_kept(path, _size(config), fix)]


def _keep(path: Path, texts: Sequence[str], ranks: Ranks) -> None:
    if ranks.first_here:
        write_kept(path, [{"text": text} for text in texts], {"source": "self"})


def _require_usable(model: nn.Module, tokenizer: Any, config: GeReConfig) -> None:
    require_tokenizer(config, tokenizer)
    # Each rank samples other texts, so that it calls the model a different number of times. With a part of the
    # weights on each rank, all would wait for each other.
    if is_sharded(model):
        raise UnsupportedSettingError(
            "A model whose weights are spread over processes cannot write its replay texts.",
            where='gere_config.replay_dataset="self"',
            expected="a model that each process holds whole until it is wrapped",
            found="weights of DeepSpeed ZeRO-3 or FSDP2",
            fix="Write the texts first by `gere replay --source self --model MODEL --out replay.jsonl`, and set "
            "gere_config.replay_dataset to that file.",
        )
