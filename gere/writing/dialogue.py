"""A chat template taken apart: what stands before a user's message, between it and the answer, and behind that."""

from __future__ import annotations

from typing import Any, NamedTuple

from gere.errors import TokenizerError

USER, ANSWER = "gere-user-message", "gere-answer-of-the-model"


class Dialogue(NamedTuple):
    """The fixed parts of a conversation of one message and one answer, special tokens as text.

    Attributes:
        opening: What the template writes before the user's message, its own system prompt included.
        turn: What ends the message and begins the answer.
        closing: What ends the answer.
    """

    opening: str
    turn: str
    closing: str


def take_apart(tokenizer: Any) -> Dialogue:
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
    except Exception as error:  # a template raises what it likes
        raise _unusable(f"{type(error).__name__}: {error}") from error
    if asked.count(USER) != 1 or answered.count(ANSWER) != 1:
        raise _unusable(f"{asked!r} for the message {USER!r}, {answered!r} with the answer {ANSWER!r}")
    opening, turn = asked.split(USER)
    return Dialogue(opening, turn, answered.split(ANSWER)[1])


def _unusable(found: str) -> TokenizerError:
    return TokenizerError(
        "The chat template cannot be used to sample conversations.",
        where="tokenizer.chat_template",
        expected="a template that shows a user's message, and an answer to it, once and unchanged",
        found=found,
        fix='Set gere_config.self_prompt="bos" (--prompt bos).',
    )
