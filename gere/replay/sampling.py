"""Sampling of the base model: from its BOS token, or as a conversation in its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from gere._files import sha256
from gere.config import GeReConfig
from gere.errors import ReplaySetError, TokenizerError, UnsupportedModelError
from gere.model.adapters import base_module
from gere.model.forward import as_base
from gere.model.generate import generate, own_randomness
from gere.replay.rows import adds_bos, private_copy
from gere.replay.sieve import LEAST_TOKENS, Sample

USER, ANSWER = "gere-user-message", "gere-answer-of-the-model"


class Dialogue(NamedTuple):
    """Text before a user's message (with the system prompt), between message and answer, and after the answer."""

    opening: str
    turn: str
    closing: str


def prompt_of(tokenizer: Any, config: GeReConfig) -> str:
    """Choose what the base model continues: its chat template (`"chat"`) or its BOS token (`"bos"`)."""
    if config.self_prompt != "auto":
        return config.self_prompt
    return "chat" if getattr(tokenizer, "chat_template", None) else "bos"


def split_chat_template(tokenizer: Any) -> Dialogue:
    """Find the fixed parts of a chat template that shows a message and its answer as they are."""
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


class TextSampler:
    """Sample batches of texts from the base model inside `model`; model and tokenizer stay as they are.

    Raises:
        TokenizerError: If there is no token, or no usable chat template, to begin with.
        ReplaySetError: If `max_length` does not fit the model or the chat template.
        UnsupportedModelError: If the model cannot generate.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: GeReConfig) -> None:
        self._model, self._config = model, config
        self._causal: Any = base_module(model)
        self._tokenizer = private_copy(tokenizer)
        if not callable(getattr(self._causal, "generate", None)):
            raise UnsupportedModelError(
                "The model cannot write the replay texts.",
                where=type(self._causal).__name__,
                expected="a Hugging Face causal language model with generate()",
                fix="Set gere_config.replay_dataset to general texts from elsewhere.",
            )
        self._chats = prompt_of(tokenizer, config) == "chat"
        self._adds_bos = adds_bos(self._tokenizer, config)
        self._dialogue = self._chat() if self._chats else Dialogue("", "", "")
        self._opening = self._first_ids() + self._encode(self._dialogue.opening)
        self._turn = self._encode(self._dialogue.turn)
        self._stops = self._stop_ids()
        self._require_room()

    def batch(self, number: int) -> list[Sample]:
        """Sample the texts of one batch. They depend on its number, not on what was sampled before."""
        seed = int(sha256(f"{self._config.self_seed} {number}".encode())[:15], 16)
        device = self._causal.get_input_embeddings().weight.device
        with as_base(self._model), own_randomness(device, seed):
            contexts = [self._opening] * self._config.self_batch_size
            if self._chats:
                return self._conversations(contexts)
            rows = [self._without_stop(row)[0] for row in self._continue(contexts)]
            return [Sample(self._text(ids, skip_special=True), [ids]) for ids in rows]

    def _conversations(self, contexts: list[list[int]]) -> list[Sample]:
        """Sample a message in at most half of the room, then the answer in the rest."""
        room = self._config.max_length - len(self._opening) - len(self._turn)
        messages = [self._message(row) for row in self._continue(contexts, room // 2)]
        answers = self._continue([self._opening + ids + self._turn for _, ids in messages])
        samples = []
        for (message, ids), row in zip(messages, answers, strict=True):
            answer_ids, ended = self._without_stop(row)
            answer = self._text(answer_ids)
            text = self._dialogue.opening + message + self._dialogue.turn + answer
            # An answer that was cut at `max_length` is not closed.
            if ended:
                text += self._dialogue.closing
            parts = [ids, answer_ids]
            # Spaces are no message and no answer. The sieve drops a sample without parts.
            if not message.strip() or not answer.strip():
                parts = []
            samples.append(Sample(text, parts))
        return samples

    def _message(self, row: list[int]) -> tuple[str, list[int]]:
        """Return the text and the token ids of a user's message."""
        ids, _ = self._without_stop(row)
        text, end = self._text(ids), self._dialogue.turn.strip()
        # A template may end a message by plain words, which are no token to stop at.
        if end and end in text:
            text = text[: text.index(end)]
            return text, self._encode(text)
        return text, ids

    def _continue(self, contexts: Sequence[Sequence[int]], most: int | None = None) -> list[list[int]]:
        """Continue each context by at most `most` tokens, by default as far as the longest one has room."""
        return generate(
            self._model,
            contexts,
            pad_id=self._tokenizer.pad_token_id,
            max_new_tokens=most or self._config.max_length - max(map(len, contexts)),
            stops=self._stops,
            # `top_k` is 50 unless it is set, which would cut what `self_top_p` leaves.
            sampling={"temperature": self._config.self_temperature, "top_p": self._config.self_top_p, "top_k": 0},
        )

    def _without_stop(self, row: list[int]) -> tuple[list[int], bool]:
        """Drop the token that ends a text, and tell whether there was one."""
        if row and row[-1] in self._stops:
            return row[:-1], True
        return row, False

    def _chat(self) -> Dialogue:
        dialogue = split_chat_template(self._tokenizer)
        if not self._adds_bos:
            return dialogue
        # The tokenizer puts BOS before each replay row. The template's own would be a second one.
        return dialogue._replace(opening=dialogue.opening.removeprefix(self._tokenizer.bos_token))

    def _first_ids(self) -> list[int]:
        """Return the token that every text begins with; none if the chat template brings its own."""
        if self._chats and not self._adds_bos:
            return []
        first = self._tokenizer.bos_token_id
        if first is None:
            first = self._tokenizer.eos_token_id
        if first is None:
            raise TokenizerError(
                "The tokenizer has no token that a text could begin with.",
                where="tokenizer.bos_token",
                expected="a bos_token, or an eos_token in its place",
                found="neither",
                fix="Set tokenizer.bos_token, or gere_config.replay_dataset to texts from elsewhere.",
            )
        return [first]

    def _stop_ids(self) -> set[int]:
        """Return the tokens that end a text or begin another one, and special tokens that end a turn."""
        own: Any = getattr(getattr(self._causal, "generation_config", None), "eos_token_id", None)
        if not isinstance(own, list | tuple):
            own = [own]
        stops = {*own, self._tokenizer.eos_token_id, self._tokenizer.bos_token_id}
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.get_added_vocab().values()}
        for end in (self._dialogue.turn, self._dialogue.closing):
            # A plain word at the end of a turn may be a part of a message. `_message` looks for the whole end.
            stops |= special & {*self._encode(end.strip())[:1]}
        return stops - {None}

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _text(self, ids: list[int], *, skip_special: bool = False) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")  # half a character, where the text was cut

    def _require_room(self) -> None:
        """Refuse lengths that the model or the template has no room for."""
        longest = self._config.max_length
        positions = getattr(getattr(self._model, "config", None), "max_position_embeddings", None) or longest
        parts = 2 if self._chats else 1
        least = len(self._opening) + len(self._turn) + parts * LEAST_TOKENS
        if not least <= longest <= positions:
            raise ReplaySetError(
                "The base model cannot write replay texts of this length.",
                where="gere_config.max_length",
                expected=f"{least} tokens, for what every text begins with, to {positions}, the model's positions",
                found=longest,
                fix=f"Set gere_config.max_length to at most {positions}, and to {least} or more.",
            )
