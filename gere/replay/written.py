"""Texts that the base model writes for its own replay: sampled once, before it is trained, and kept in a file.

The file is `replay-self-KEY.jsonl` beside the anchors. Its key follows from the base model, the tokenizer and the
settings of the sampling, so that a fine-tuned model finds the texts of its base.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm

from gere._files import canonical_json, make_folder, read_lines, sha256, write_atomic
from gere.cache.fingerprint import architecture_digest, weights_digest
from gere.config import GeReConfig
from gere.errors import (
    CacheCorruptError,
    CacheMissingError,
    ReplaySetError,
    TokenizerError,
    UnsupportedModelError,
    UnsupportedSettingError,
)
from gere.model.adapters import base_module
from gere.model.forward import as_base
from gere.model.generate import generate, own_randomness
from gere.model.sharded import is_sharded
from gere.ranks import ALONE, Ranks
from gere.replay.rows import adds_bos, private_copy, require_tokenizer, tokenizer_digest
from gere.replay.texts import HUB_SIZE

logger = logging.getLogger("gere")

METHOD = "2"  # raised when the same settings would give other texts
LEAST_TOKENS = 8
# 64 samples of a story model with 15M weights had shares of 0.90 to 1.00; a loop of p tokens in n has about p / n.
LOOP_GRAM, LOOP_SHARE = 4, 0.5
MOST_DRAWS = 4  # samples for each text that is asked for
USER, ANSWER = "gere-user-message", "gere-answer-of-the-model"


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
    """Texts of the base model: read if they are kept, else sampled and kept; the same on every rank.

    Args:
        model: The model as it stands, without a distributed wrapper. An adapter is disabled.
        tokenizer: The user's tokenizer.
        config: Number, length and sampling.
        folder: Where the texts are kept.
        base_weights: Digest of the weights of the base model, for a model that was fine-tuned since; `None` if the
            model is its own base.
        ranks: All processes; each must call this.
        progress: Show a progress bar.

    Raises:
        CacheMissingError: If the model was fine-tuned and the texts of its base are not in the folder.
        CacheCorruptError: If the file of the texts is damaged.
        ReplaySetError: If the model gives too few usable texts.
        UnsupportedSettingError: If the weights are spread over processes.
        TokenizerError: If the tokenizer lacks what a text begins with.
        UnsupportedModelError: If the model cannot generate.
        CacheFolderError: If the folder cannot be written.
        RankFailedError: If another process failed.
    """
    ranks.together(lambda: _require_usable(model, tokenizer, config))
    # Fine-tuning moves the weights and leaves the architecture.
    base = f"{architecture_digest(model)} {base_weights or weights_digest(model, ranks)}"
    path = folder / f"replay-self-{_key(tokenizer, config, base)}.jsonl"
    # Machines may have disks of their own, and the texts on one of them.
    kept = [texts for texts in ranks.ask(lambda: _read(path, config) if ranks.first_here else None) if texts]
    if kept:
        return kept[0]
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
    ranks.together(lambda: _keep(path, sieve.texts) if ranks.first_here else None)
    if ranks.index == 0:
        logger.info("The base model wrote its replay texts, %s: %s", path, sieve)
    return sieve.texts


def _key(tokenizer: Any, config: GeReConfig, base: str) -> str:
    """Digest of all that the texts follow from, 16 hexadecimal digits."""
    chat = prompt_of(tokenizer, config) == "chat"
    content = {
        "method": METHOD,
        "base": base,
        "tokenizer": tokenizer_digest(tokenizer),
        "begins_with_bos": adds_bos(private_copy(tokenizer), config),
        "chat_template": str(getattr(tokenizer, "chat_template", None)) if chat else "",
        "size": _size(config),
        "max_length": config.max_length,
        "temperature": config.self_temperature,
        "top_p": config.self_top_p,
        "batch_size": config.self_batch_size,
        "seed": config.self_seed,
    }
    return sha256(canonical_json(content))[:16]


def _size(config: GeReConfig) -> int:
    return config.replay_size or HUB_SIZE


def _read(path: Path, config: GeReConfig) -> list[str] | None:
    """Texts of a file; `None` if it is not there."""
    if not path.is_file():
        return None
    try:
        texts: list[str] = [record["text"] for record in read_lines(path)]
        # Other damage is found by the anchor, which knows the digest of its texts.
        if len(texts) != _size(config):
            raise ValueError(f"{len(texts)} texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheCorruptError(
            "The replay texts of the base model are damaged.",
            where=path,
            expected=f"{_size(config)} lines, each a JSON object with the key 'text'",
            found=f"{type(error).__name__}: {error}",
            fix="Restore the file; or delete it, and start from the base model, which writes the same texts again.",
        ) from error
    return texts


def _keep(path: Path, texts: Sequence[str]) -> None:
    make_folder(path.parent)
    write_atomic(path, text_lines(texts, ["self"] * len(texts)))


def text_lines(texts: Sequence[str], sources: Sequence[str]) -> bytes:
    """Write texts as lines of JSON, each with its source."""
    records = [{"text": text, "source": source} for text, source in zip(texts, sources, strict=True)]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    return "".join(lines).encode("utf-8", "surrogatepass")


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


class Sample(NamedTuple):
    """One sampled text.

    Attributes:
        text: The text.
        parts: Its sampled token ids, without those that end a text: one part, or the user's message and the answer.
    """

    text: str
    parts: Sequence[Sequence[int]]


class Sieve:
    """Keeps the first usable samples: long enough, no loop, each once.

    Args:
        wanted: Texts to keep.

    Attributes:
        texts: The kept texts.
        counts: Samples that were `drawn`, and those that were dropped: `too_short` (without text, under 8 tokens, or
            with an empty part), `loops` (see `is_loop`), `duplicates` (of a kept text, by `caseless`).
    """

    def __init__(self, wanted: int) -> None:
        self.texts: list[str] = []
        self.counts = {"asked": wanted, "drawn": 0, "too_short": 0, "duplicates": 0, "loops": 0}
        self._seen: set[str] = set()

    @property
    def full(self) -> bool:
        """Whether enough texts are kept."""
        return len(self.texts) >= self.counts["asked"]

    def add(self, samples: Iterable[Sample]) -> None:
        """Look at samples until enough are kept."""
        for sample in samples:
            if self.full:
                return
            self.counts["drawn"] += 1
            text = sample.text.strip()
            fault = self._fault(text, sample.parts)
            if fault is None:
                self.texts.append(text)
                self._seen.add(caseless(text))
            else:
                self.counts[fault] += 1

    def _fault(self, text: str, parts: Sequence[Sequence[int]]) -> str | None:
        if not text or not all(parts) or sum(map(len, parts)) < LEAST_TOKENS:
            return "too_short"
        if any(map(is_loop, parts)):
            return "loops"
        return "duplicates" if caseless(text) in self._seen else None

    def __str__(self) -> str:
        """Count what was kept and dropped, for a log or an error."""
        dropped = "{too_short} too short, {duplicates} duplicates, {loops} loops".format(**self.counts)
        return f"{len(self.texts)} kept of {self.counts['drawn']} drawn; dropped: {dropped}"


def is_loop(tokens: Sequence[Any]) -> bool:
    """Tell whether a text repeats itself: under half of its runs of four tokens are different ones.

    Args:
        tokens: Tokens, or words. Fewer than four are no loop.

    Example:
        >>> is_loop("the cat sat on the mat and then the dog sat down".split()), is_loop(["a", "b"] * 20)
        (False, True)
    """
    grams = [tuple(tokens[start : start + LOOP_GRAM]) for start in range(len(tokens) - LOOP_GRAM + 1)]
    return len(set(grams)) < LOOP_SHARE * len(grams)


def caseless(text: str) -> str:
    """Drop case and runs of spaces from a text, to find duplicates."""
    return " ".join(text.lower().split())


def draw(
    batch: Callable[[int], Sequence[Sample]], wanted: int, ranks: Ranks = ALONE, *, progress: bool = False
) -> Sieve:
    """Sample until enough texts are kept.

    The ranks share the batches. All of them look at the samples in the order of the batch numbers, so that any number
    of ranks keeps the same texts.

    Args:
        batch: Gives the samples of a batch by its number.
        wanted: Texts to keep.
        ranks: All processes; each must call this.
        progress: Show a progress bar.

    Raises:
        ReplaySetError: If four samples for each text did not give enough.
        RankFailedError: If another process failed.
    """
    sieve, number = Sieve(wanted), 0
    with tqdm(total=wanted, desc="replay texts of the base model", disable=not progress) as bar:
        while not sieve.full:
            for samples in ranks.ask(partial(batch, number + ranks.index)):
                sieve.add(samples)
                # After each batch, so that any number of ranks gives up at the same one.
                if not sieve.full and sieve.counts["drawn"] >= MOST_DRAWS * wanted:
                    raise _too_few(sieve)
            number += ranks.count
            bar.update(len(sieve.texts) - bar.n)
    return sieve


def _too_few(sieve: Sieve) -> ReplaySetError:
    wanted = sieve.counts["asked"]
    return ReplaySetError(
        "The base model gives too few usable texts.",
        where='gere_config.replay_dataset="self"',
        expected=f"{wanted} texts (gere_config.replay_size) of at most {MOST_DRAWS * wanted} samples",
        found=str(sieve),
        fix="Too short: set gere_config.max_length higher, or self_prompt to the other one. Duplicates or loops: set "
        "self_temperature or self_top_p higher. Or set replay_size lower.",
    )


class Dialogue(NamedTuple):
    """Fixed parts of a conversation of one message and one answer, special tokens as text.

    Attributes:
        opening: Text before the user's message, with the template's own system prompt.
        turn: Text between the message and the answer.
        closing: Text after the answer.
    """

    opening: str
    turn: str
    closing: str


def split_chat_template(tokenizer: Any) -> Dialogue:
    """Find the fixed parts of a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        TokenizerError: If there is no template, or it does not show a user's message as it is.
    """
    message, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    try:
        asked = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template([message, answer], tokenize=False)
    except Exception as error:  # a template can raise anything
        raise _unusable_template(f"{type(error).__name__}: {error}") from error
    if asked.count(USER) != 1 or answered.count(ANSWER) != 1:
        raise _unusable_template(f"{asked!r} for the message {USER!r}, {answered!r} with the answer {ANSWER!r}")
    opening, turn = asked.split(USER)
    return Dialogue(opening, turn, answered.split(ANSWER)[1])


def _unusable_template(found: str) -> TokenizerError:
    return TokenizerError(
        "The chat template cannot be used to sample conversations.",
        where="tokenizer.chat_template",
        expected="a template that shows a user's message, and an answer to it, once and unchanged",
        found=found,
        fix='Set gere_config.self_prompt="bos" (--set self_prompt=bos).',
    )


def prompt_of(tokenizer: Any, config: GeReConfig) -> str:
    """Choose what the base model continues: its chat template (`"chat"`) or its BOS token (`"bos"`)."""
    if config.self_prompt != "auto":
        return config.self_prompt
    return "chat" if getattr(tokenizer, "chat_template", None) else "bos"


class TextSampler:
    """Samples batches of texts from the base model; model and tokenizer stay as they are.

    Args:
        model: The model without its distributed wrapper.
        tokenizer: The user's tokenizer; a copy of it is used.
        config: The sampling.

    Raises:
        TokenizerError: If there is no token, or no usable chat template, to begin with.
        ReplaySetError: If `max_length` does not fit the model or the chat template.
        UnsupportedModelError: If the model cannot generate.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: GeReConfig) -> None:
        self._model = model
        self._tokenizer = private_copy(tokenizer)
        self._config = config
        self._pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self._sampling = {"temperature": config.self_temperature, "top_p": config.self_top_p, "top_k": 0}
        _require_generate(model)
        self._dialogue = self._chat() if prompt_of(tokenizer, config) == "chat" else None
        opening, turn = ("", "") if self._dialogue is None else self._dialogue[:2]
        self._opening, self._turn = self._opening_ids(opening), self._encode(turn)
        self._stops = self._stop_ids()
        self._require_room()

    def batch(self, number: int) -> list[Sample]:
        """Sample the texts of one batch. They depend on its number, not on what was sampled before."""
        seed = int(sha256(f"{self._config.self_seed} {number}".encode())[:15], 16)
        causal: Any = base_module(self._model)
        device = causal.get_input_embeddings().weight.device
        with as_base(self._model), own_randomness(device, seed):
            contexts = [self._opening] * self._config.self_batch_size
            if self._dialogue is not None:
                return self._conversations(self._dialogue, contexts)
            rows = [self._without_stop(row)[0] for row in self._continue(contexts)]
            return [Sample(self._text(ids, skip_special=True), [ids]) for ids in rows]

    def _conversations(self, dialogue: Dialogue, contexts: list[list[int]]) -> list[Sample]:
        """Sample a message in at most half of the room, then the answer in the rest."""
        room = self._config.max_length - len(self._opening) - len(self._turn)
        messages = [self._message(dialogue, row) for row in self._continue(contexts, room // 2)]
        answers = self._continue([self._opening + ids + self._turn for _, ids in messages])
        samples = []
        for (message, ids), row in zip(messages, answers, strict=True):
            answer, ended = self._without_stop(row)
            text = self._text(answer)
            # An answer that was cut by the room is not closed.
            whole = dialogue.opening + message + dialogue.turn + text + (dialogue.closing if ended else "")
            parts = ((message, ids), (text, answer))
            samples.append(Sample(whole, [tokens if words.strip() else [] for words, tokens in parts]))
        return samples

    def _message(self, dialogue: Dialogue, row: list[int]) -> tuple[str, list[int]]:
        """Text and token ids of a user's message."""
        # A template may end a message by plain words, which are no token to stop at.
        ids, _ = self._without_stop(row)
        text, end = self._text(ids), dialogue.turn.strip()
        if end and end in text:
            text = text[: text.index(end)]
            return text, self._encode(text)
        return text, ids

    def _continue(self, contexts: Sequence[Sequence[int]], most: int | None = None) -> list[list[int]]:
        """Continue each context by at most `most` tokens, by default as far as the longest one has room."""
        left = self._config.max_length - max(map(len, contexts))
        return generate(
            self._model,
            contexts,
            pad_id=self._pad_id,
            max_new_tokens=most or left,
            stops=self._stops,
            sampling=self._sampling,
        )

    def _without_stop(self, row: list[int]) -> tuple[list[int], bool]:
        """Drop the token that ends a text, and tell whether there was one."""
        if row and row[-1] in self._stops:
            return row[:-1], True
        return row, False

    def _chat(self) -> Dialogue:
        """Split the chat template, without a BOS that the tokenizer adds by itself."""
        dialogue = split_chat_template(self._tokenizer)
        if adds_bos(self._tokenizer, self._config):
            dialogue = dialogue._replace(opening=dialogue.opening.removeprefix(self._tokenizer.bos_token))
        return dialogue

    def _opening_ids(self, text: str) -> list[int]:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if self._dialogue is not None:
            first = [bos] if adds_bos(self._tokenizer, self._config) else []
            return first + self._encode(text)
        if bos is None and eos is None:
            raise TokenizerError(
                "The tokenizer has no token that a text could begin with.",
                where="tokenizer.bos_token",
                expected="a bos_token, or an eos_token in its place",
                found="neither",
                fix="Set tokenizer.bos_token, or gere_config.replay_dataset to texts from elsewhere.",
            )
        return [eos if bos is None else bos]

    def _stop_ids(self) -> set[int]:
        """Token ids that end a text or begin another one, and special tokens that end a turn."""
        tokenizer, causal = self._tokenizer, base_module(self._model)
        ids = getattr(getattr(causal, "generation_config", None), "eos_token_id", None)
        listed = ids if isinstance(ids, list | tuple) else [ids]
        own = {*listed, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        ends = [] if self._dialogue is None else [self._dialogue.turn, self._dialogue.closing]
        first = [self._encode(end.strip())[:1] for end in ends]
        return own | {token for token_ids in first for token in token_ids if token in special}

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _text(self, ids: list[int], *, skip_special: bool = False) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")  # half a character, where the text was cut

    def _require_room(self) -> None:
        """Refuse lengths that the model or the template has no room for."""
        longest = self._config.max_length
        positions = getattr(getattr(self._model, "config", None), "max_position_embeddings", None) or longest
        parts = 1 if self._dialogue is None else 2
        least = len(self._opening) + len(self._turn) + parts * LEAST_TOKENS
        if not least <= longest <= positions:
            raise ReplaySetError(
                "The base model cannot write replay texts of this length.",
                where="gere_config.max_length",
                expected=f"{least} tokens, for what every text begins with, to {positions}, the model's positions",
                found=longest,
                fix=f"Set gere_config.max_length to at most {positions}, and to {least} or more.",
            )


def _require_generate(model: nn.Module) -> None:
    causal = base_module(model)
    if not callable(getattr(causal, "generate", None)):
        raise UnsupportedModelError(
            "The model cannot write the replay texts.",
            where=type(causal).__name__,
            expected="a Hugging Face causal language model with generate()",
            fix="Set gere_config.replay_dataset to general texts from elsewhere.",
        )
