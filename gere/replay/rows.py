"""The replay set: texts as rows of token ids, and the fields that its anchor depends on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gere._files import canonical_json, sha256
from gere._log import logger
from gere.cache.fingerprint import text_digest
from gere.config import GeReConfig
from gere.errors import ReplaySetError, TokenizerError
from gere.replay.texts import Source, few, load_texts, read_texts

T = TypeVar("T")


# The share of a set that is held out at most.
MOST_HELDOUT = 10


class ReplaySet(NamedTuple):
    """Replay rows, ready to be batched, and the rows that are measured and never replayed.

    Attributes:
        rows: Token ids of each replay row.
        heldout: Token ids of each held-out row; empty if nothing is measured.
        pad_id: Id of the padding token.
        fields: What the anchor depends on: `tokenizer`, `texts`, `max_length`, `input_ids`, and `heldout`
            if there are such rows.
    """

    rows: list[list[int]]
    heldout: list[list[int]]
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
    if config.heldout_dataset is None:
        measured = held_out(texts, config.replay_heldout)
        heldout = [rows[place] for place in measured]
        replayed = [place for place in range(len(texts)) if place not in measured]
        texts, rows = [texts[place] for place in replayed], [rows[place] for place in replayed]
    else:
        heldout = tokenize(_measured_texts(config, cache_folder, texts), tokenizer, config, "heldout_dataset")
    # `tokenizer` covers the vocabulary alone. `input_ids` also changes with merges, normalisation and BOS.
    fields = {
        "tokenizer": tokenizer_digest(tokenizer),
        "texts": text_digest(texts),
        "max_length": f"{config.max_length} tokens, add_bos {config.add_bos}",
        "input_ids": text_digest(rows),
    }
    if heldout:
        fields["heldout"] = f"{len(heldout)} rows, {text_digest(heldout)[:32]}"
    return ReplaySet(rows, heldout, tokenizer.pad_token_id, fields)


def held_out(texts: Sequence[str], most: int) -> list[int]:
    """Choose the places of the texts that are measured: at most a tenth, evenly spread, and none that comes twice.

    Example:
        >>> held_out(["a", "b", "b", *map(str, range(27))], 2)
        [0, 16]
    """
    times = Counter(texts)
    single = [place for place, text in enumerate(texts) if times[text] == 1]
    return spread(single, min(most, len(texts) // MOST_HELDOUT, len(single)))


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take at most `count` items, evenly spread and with the first one."""
    if count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def _measured_texts(config: GeReConfig, cache_folder: Path, replayed: Sequence[str]) -> list[str]:
    """Read the texts of `heldout_dataset` that are not replayed."""
    where = "gere_config.heldout_dataset"
    source = Source(config.heldout_dataset, where, None, config.replay_split, config.replay_column)
    texts = read_texts(source, cache_folder)
    known = set(replayed)
    unseen = [text for text in dict.fromkeys(texts) if text not in known]
    if not unseen:
        raise ReplaySetError(
            "All held-out texts are replayed, so that they cannot tell what was forgotten.",
            where=where,
            expected="texts that are not in gere_config.replay_dataset",
            found=f"{len(texts)} texts, all of them in it",
            fix="Leave heldout_dataset out: a part of replay_dataset is then held out.",
        )
    if len(unseen) < len(texts):
        logger.warning("%s: %d of %d texts are replayed or come twice, and are left out.",
                       where, len(texts) - len(unseen), len(texts))  # fmt: skip
    return spread(unseen, config.replay_heldout)


def tokenize(
    texts: Sequence[str], tokenizer: Any, config: GeReConfig, setting: str = "replay_dataset"
) -> list[list[int]]:
    """Turn texts of a setting into rows of at most `max_length` token ids.

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
            "Texts have fewer than two tokens, so there is nothing to predict in them.",
            where=f"gere_config.{setting}, rows {few(short)}",
            expected="at least 2 tokens",
            found=f"{len(short)} shorter rows of {len(rows)}",
            fix="Drop these rows.",
        )
    return rows


def private_copy(tokenizer: Any) -> Any:
    """Copy a tokenizer, since a call changes the truncation state of a fast one."""
    return copy.deepcopy(tokenizer)


def tokenizer_of(processing: Any) -> Any:
    """Return the tokenizer inside a processor, such as that of an image-text model; anything else as it is."""
    # A tokenizer can have an attribute of this name, too.
    if not hasattr(processing, "get_vocab") and hasattr(processing, "tokenizer"):
        return processing.tokenizer
    return processing


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
