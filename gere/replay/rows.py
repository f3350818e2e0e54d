"""The replay set: texts as rows of token ids, and the fields that its anchor depends on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere._files import canonical_json, sha256
from gere.cache.fingerprint import text_digest
from gere.config import GeReConfig
from gere.errors import ReplaySetError, TokenizerError
from gere.replay.texts import few, load_texts


class ReplaySet(NamedTuple):
    """Replay rows, ready to be batched.

    Attributes:
        rows: Token ids of each row.
        pad_id: Id of the padding token.
        fields: What the anchor depends on: `tokenizer`, `texts`, `max_length`, `input_ids`.
    """

    rows: list[list[int]]
    pad_id: int
    fields: dict[str, str]


def load_replay_set(
    config: GeReConfig, tokenizer: Any, cache_folder: Path, own_texts: Sequence[str] | None = None
) -> ReplaySet:
    """Read, tokenise and cut the replay set.

    Args:
        config: Source, size and length.
        tokenizer: The user's tokenizer; a copy of it is used.
        cache_folder: Folder that keeps texts from the hub.
        own_texts: Texts of the base model, for the source `"self"`.

    Raises:
        ReplaySetError: If the set is missing, empty, too short or has rows of no text or of one token.
        ReplayDownloadError: If it is on the hub and cannot be fetched.
        TokenizerError: If there is no tokenizer, or it lacks a token that is needed.
    """
    require_tokenizer(config, tokenizer)
    texts = load_texts(config, cache_folder, own_texts)
    rows = tokenize(texts, tokenizer, config)
    # `tokenizer` covers the vocabulary alone. `input_ids` also changes with merges, normalisation and BOS.
    fields = {
        "tokenizer": tokenizer_digest(tokenizer),
        "texts": text_digest(texts),
        "max_length": f"{config.max_length} tokens, add_bos {config.add_bos}",
        "input_ids": text_digest(rows),
    }
    return ReplaySet(rows, tokenizer.pad_token_id, fields)


def tokenize(texts: Sequence[str], tokenizer: Any, config: GeReConfig) -> list[list[int]]:
    """Turn texts into rows of at most `max_length` token ids.

    Raises:
        ReplaySetError: If a row has fewer than two tokens, so that nothing can be predicted.
    """
    private = private_copy(tokenizer)
    # By default the tokenizer decides on BOS. With `add_bos` its special tokens are off, or BOS would come twice.
    encoded = private(list(texts), add_special_tokens=config.add_bos is None, verbose=False)["input_ids"]
    prefix = [tokenizer.bos_token_id] if config.add_bos else []
    rows = [(prefix + list(ids))[: config.max_length] for ids in encoded]
    short = [index for index, row in enumerate(rows) if len(row) < 2]
    if short:
        raise ReplaySetError(
            "Rows of the replay set have fewer than two tokens, so there is nothing to predict in them.",
            where=f"gere_config.replay_dataset, rows {few(short)}",
            expected="at least 2 tokens",
            found=f"{len(short)} shorter rows of {len(rows)}",
            fix="Drop these rows.",
        )
    return rows


def private_copy(tokenizer: Any) -> Any:
    """Copy a tokenizer, since a call changes the truncation state of a fast one."""
    return copy.deepcopy(tokenizer)


def adds_bos(tokenizer: Any, config: GeReConfig) -> bool:
    """Return whether `tokenize` puts the BOS token before a text; `tokenizer` is a private copy."""
    if config.add_bos is not None or tokenizer.bos_token_id is None:
        return bool(config.add_bos)
    # Tried out, since tokenizers have no common attribute that says so.
    return tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest the vocabulary and the special tokens."""
    specials = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256(canonical_json({"vocabulary": tokenizer.get_vocab(), "special": specials}))


def require_tokenizer(config: GeReConfig, tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot make replay rows, with a `TokenizerError`."""
    if not hasattr(tokenizer, "get_vocab"):
        raise TokenizerError(
            "Replay needs a tokenizer.",
            where="processing_class",
            expected="the tokenizer of the model",
            found=type(tokenizer).__name__,
            fix="Pass processing_class=tokenizer.",
        )
    if tokenizer.pad_token_id is None:
        raise TokenizerError(
            "The tokenizer has no padding token, which batches of replay rows need.",
            where="tokenizer.pad_token",
            expected="a token",
            found="None",
            fix="Set tokenizer.pad_token = tokenizer.eos_token; padding is masked, so any token works.",
        )
    if config.add_bos and tokenizer.bos_token_id is None:
        raise TokenizerError(
            "Replay rows are to begin with BOS, which the tokenizer does not have.",
            where="gere_config.add_bos",
            expected="a tokenizer with a bos_token",
            found="None",
            fix="Leave gere_config.add_bos out, or set tokenizer.bos_token.",
        )
