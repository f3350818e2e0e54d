"""The replay set: texts as rows of token ids, and the fields that its anchor depends on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere._files import canonical_json, sha256
from gere._log import logger
from gere.cache.fingerprint import text_digest
from gere.cache.heldout import held_out, spread
from gere.config import GeReConfig
from gere.errors import ReplaySetError, TokenizerError
from gere.replay.forms import Templated
from gere.replay.texts import config_source, load_texts, read_rows

# Characters that are tokenised for each token of a row, and tokens beyond the row that stay as they are.
CHARACTERS, SPARE = 8, 32


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
        ReplaySetError: If the set is missing, empty or too short, or a row has an unknown form.
        ReplayDownloadError: If it is on the hub and cannot be fetched.
        TokenizerError: If there is no tokenizer, or it lacks a token that is needed.
    """
    require_tokenizer(config, tokenizer)
    texts = load_texts(config, cache_folder, own_texts, tokenizer)
    texts, rows = _predicting(texts, tokenizer, config, "replay_dataset")
    if config.heldout_dataset is None:
        measured = held_out(texts, config.replay_heldout)
        heldout = [rows[place] for place in measured]
        replayed = [place for place in range(len(texts)) if place not in measured]
        texts, rows = [texts[place] for place in replayed], [rows[place] for place in replayed]
    else:
        measured_texts = _measured_texts(config, cache_folder, texts, tokenizer)
        heldout = _predicting(measured_texts, tokenizer, config, "heldout_dataset")[1]
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


def _measured_texts(config: GeReConfig, cache_folder: Path, replayed: Sequence[str], tokenizer: Any) -> list[str]:
    """Read the texts of `heldout_dataset` that are not replayed."""
    where = "gere_config.heldout_dataset"
    source = config_source(config, config.heldout_dataset, "heldout_dataset", None)
    texts = [row.render(tokenizer) for row in read_rows(source, cache_folder)]
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


def _predicting(
    texts: Sequence[str], tokenizer: Any, config: GeReConfig, setting: str
) -> tuple[list[str], list[list[int]]]:
    """Tokenise texts, and leave those out that have nothing to predict."""
    rows = tokenize(texts, tokenizer, config)
    places = with_two_tokens(rows, f"gere_config.{setting}")
    return [texts[place] for place in places], [rows[place] for place in places]


def with_two_tokens(rows: Sequence[Sequence[int]], where: str) -> list[int]:
    """Return the places of the rows that have two tokens or more: the first token of a row is not predicted.

    Raises:
        ReplaySetError: If there are none.
    """
    places = [place for place, row in enumerate(rows) if len(row) > 1]
    if not places:
        raise ReplaySetError(
            "Texts have fewer than two tokens, so there is nothing to predict in them.",
            where=where,
            expected="a text of at least 2 tokens",
            found=f"{len(rows)} texts, all of them shorter",
            fix="Give longer texts.",
        )
    if len(places) < len(rows):
        what = "%s: %d of %d texts have fewer than two tokens, and are left out."
        logger.warning(what, where, len(rows) - len(places), len(rows))
    return places


def tokenize(texts: Sequence[str], tokenizer: Any, config: GeReConfig) -> list[list[int]]:
    """Turn texts into rows of at most `max_length` token ids."""
    return token_rows(texts, tokenizer, config.max_length, config.add_bos)


def token_rows(texts: Sequence[str], tokenizer: Any, max_length: int, add_bos: bool | None = None) -> list[list[int]]:
    """Turn texts into rows of at most `max_length` token ids, with one BOS at most before a text.

    Args:
        texts: The texts. Those of a chat template get no special token beside its own.
        tokenizer: A tokenizer; a copy of it is used.
        max_length: Tokens of a row.
        add_bos: `True` begins each row with BOS, `False` adds no special token; by default the tokenizer decides.
    """
    private = private_copy(tokenizer)
    rows: list[list[int]] = [[] for _ in texts]
    open_places = list(range(len(texts)))
    most = CHARACTERS * max_length
    # Whole documents would be tokenised for their beginnings.
    while open_places:
        for bare in (False, True):
            places = [
                place for place in open_places if bare is (add_bos is not None or isinstance(texts[place], Templated))
            ]
            if places:
                encoded = private(
                    [texts[place][:most] for place in places], add_special_tokens=not bare, verbose=False
                )
                for place, ids in zip(places, encoded["input_ids"], strict=True):
                    rows[place] = list(ids)
        # The last tokens of a text that was cut are others than in the whole text.
        open_places = [p for p in open_places if len(texts[p]) > most and len(rows[p]) < max_length + SPARE]
        most *= 4
    return [one_bos(row, tokenizer, needed=bool(add_bos))[:max_length] for row in rows]


def one_bos(row: Sequence[int], tokenizer: Any, *, needed: bool = False) -> list[int]:
    """Return a row with one BOS at most, and with one if it is `needed`.

    A text that was shown by a chat template begins with BOS, and the tokenizer puts another one before it.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and needed and row[0:1] != [bos]:
        return [bos, *row]
    if bos is not None and row[0:2] == [bos, bos]:
        return list(row[1:])
    return list(row)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenise what a model reads before its answer: with one BOS at most, and without the token that ends a text."""
    ids = one_bos(tokenizer(prompt, verbose=False)["input_ids"], tokenizer)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


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
