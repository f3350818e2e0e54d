"""Texts that the base model of a run samples: a function of its weights, the settings, and the number of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gere.cache.files import sha256
from gere.config import GeReConfig
from gere.errors import ReplaySetError, TokenizerError
from gere.replay import adds_bos, private_copy
from gere.writing.continuation import Continuation, Writer
from gere.writing.dialogue import Dialogue, take_apart
from gere.writing.sieve import LEAST_TOKENS, Sample


class TextSampler:
    """Samples batches of texts; the model and the tokenizer stay as they are.

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
        self._tokenizer = private_copy(tokenizer)
        self._config = config
        pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self._writer = Writer(model, pad_id, config.self_temperature, config.self_top_p)
        self._dialogue = _dialogue(self._tokenizer, config) if prompt_of(tokenizer, config) == "chat" else None
        fixed = ["", ""] if self._dialogue is None else self._dialogue[:2]
        self._opening, self._turn = self._opening_ids(fixed[0]), self._encode(fixed[1])
        self._stops = self._stop_ids()
        self._require_room(model)

    def batch(self, number: int) -> list[Sample]:
        """The texts of one batch, the same for the same number, whatever was sampled before."""
        seed = int(sha256(f"{self._config.self_seed} {number}".encode())[:15], 16)
        with self._writer.as_base(seed):
            contexts = [self._opening] * self._config.self_batch_size
            if self._dialogue is None:
                return [Sample(self._text(ids, plain=True), [ids]) for ids, _ in self._go_on(contexts)]
            return self._conversations(self._dialogue, contexts)

    def _conversations(self, dialogue: Dialogue, contexts: list[list[int]]) -> list[Sample]:
        """A message in at most half of the room, then the answer in what is left."""
        room = self._config.max_length - len(self._opening) - len(self._turn)
        messages = [self._message(ids) for ids, _ in self._go_on(contexts, room // 2)]
        answers = self._go_on([self._opening + ids + self._turn for _, ids in messages])
        return [self._conversation(dialogue, *pair) for pair in zip(messages, answers, strict=True)]

    def _message(self, ids: list[int]) -> tuple[str, list[int]]:
        """A user's message; where a template ends it by plain words, the model may have written them itself."""
        text, end = self._text(ids), self._dialogue.turn.strip() if self._dialogue else ""
        if end and end in text:
            text = text[: text.index(end)]
            return text, self._encode(text)
        return text, ids

    def _conversation(self, dialogue: Dialogue, message: tuple[str, list[int]], answer: Continuation) -> Sample:
        text = self._text(answer.ids)
        whole = dialogue.opening + message[0] + dialogue.turn + text + (dialogue.closing if answer.ended else "")
        spoken = ((message[0], message[1]), (text, answer.ids))
        return Sample(whole, [ids if words.strip() else [] for words, ids in spoken])

    def _go_on(self, contexts: Sequence[Sequence[int]], most: int | None = None) -> list[Continuation]:
        left = self._config.max_length - max(map(len, contexts))
        return self._writer.go_on(contexts, left if most is None else most, self._stops)

    def _opening_ids(self, text: str) -> list[int]:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if self._dialogue is not None:
            return ([bos] if adds_bos(self._tokenizer, self._config) else []) + self._encode(text)
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
        """The tokens that end a text or begin another one, and special ones that end a turn."""
        ends = [] if self._dialogue is None else [self._dialogue.turn, self._dialogue.closing]
        first = [self._encode(end.strip())[:1] for end in ends]
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.get_added_vocab().values())
        own = {self._tokenizer.eos_token_id, self._tokenizer.bos_token_id} - {None}
        return self._writer.stops() | own | {ids[0] for ids in first if ids and ids[0] in special}

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _text(self, ids: list[int], *, plain: bool = False) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=plain, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")  # half a character, where the text was cut

    def _require_room(self, model: Any) -> None:
        """Refuse lengths that the model or the template has no room for."""
        longest = self._config.max_length
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or longest
        least = len(self._opening) + len(self._turn) + (LEAST_TOKENS if self._dialogue is None else 2 * LEAST_TOKENS)
        if not least <= longest <= positions:
            raise ReplaySetError(
                "The base model cannot write replay texts of this length.",
                where="gere_config.max_length",
                expected=f"{least} to {positions} tokens: what every text begins with, and the model's positions",
                found=longest,
                fix=f"Set gere_config.max_length (--max-length) to at most {positions}, and to {least} or more.",
            )


def prompt_of(tokenizer: Any, config: GeReConfig) -> str:
    """`"chat"` or `"bos"`: what the base model goes on from."""
    if config.self_prompt != "auto":
        return config.self_prompt
    return "chat" if getattr(tokenizer, "chat_template", None) else "bos"


def _dialogue(tokenizer: Any, config: GeReConfig) -> Dialogue:
    """The chat template taken apart, without a BOS that the tokenizer adds by itself."""
    dialogue = take_apart(tokenizer)
    if not adds_bos(tokenizer, config):
        return dialogue
    return dialogue._replace(opening=dialogue.opening.removeprefix(tokenizer.bos_token))
