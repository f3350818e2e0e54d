"""The forms of a general text: a text, a chat, an instruction with its answer, a prompt with its completion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gere.errors import ReplaySetError
from gere.replay.records import Record, blank

# ShareGPT's names of roles, and those that chat templates know.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
OPTIONS = ("tools", "chat_template_kwargs")
TEXT = "text"


class Templated(str):
    """A text with all the special tokens that it is to have: a tokenizer adds none to it."""

    __slots__ = ()


class Row(NamedTuple):
    """A general text as it was read.

    Attributes:
        where: Its place, for messages.
        form: Names of the fields that it was read from.
        text: The text; empty if there are messages.
        messages: Messages for a chat template, each with `role` and `content`.
        options: Fields of the record that the chat template takes: `tools` and `chat_template_kwargs`.
        ends: Whether EOS comes after the text.
        source: Field `source` of the record.
    """

    where: str
    form: str
    text: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = {}
    ends: bool = False
    source: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The row as a record, of which `read_row` makes the same row."""
        if self.messages:
            return {"messages": list(self.messages), **self.options}
        if self.ends:
            return {"prompt": "", "completion": self.text}
        return {"text": self.text}

    def render(self, tokenizer: Any) -> str:
        """Return the text: by the chat template of the tokenizer, or plainly joined where there is none.

        Raises:
            ReplaySetError: If the template refuses the messages.
        """
        eos = getattr(tokenizer, "eos_token", None)
        if self.ends and eos and not self.text.endswith(eos):
            return self.text + eos
        if not self.messages:
            return self.text
        if not has_template(tokenizer):
            parts = [_plain(message.get("content")) for message in self.messages]
            return "\n\n".join(part for part in parts if not blank(part))
        options = dict(self.options)
        options |= options.pop("chat_template_kwargs", {})
        try:
            return Templated(tokenizer.apply_chat_template(list(self.messages), tokenize=False, **options))
        except Exception as error:  # a template can raise anything
            raise ReplaySetError(
                "The chat template refuses a row.",
                where=self.where,
                expected="messages that tokenizer.chat_template can show",
                found=f"{type(error).__name__}: {error}",
                fix="Correct or drop the row, or set another tokenizer.chat_template.",
            ) from error


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def read_row(record: Record, column: str) -> Row | None:
    """Read a row in whichever form it has; `None` if it is empty: it has no text, or no answer.

    Args:
        record: The row as it stands in its source.
        column: Name of the field that holds a text, or messages.

    Raises:
        ValueError: If it has no such form.
    """
    value = record.value
    if isinstance(value, Row):
        return value
    if blank(value):
        return None
    if isinstance(value, str):
        return Row(record.where, TEXT, value)
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"a value of type {type(value).__name__}")
    held = value.get(column)
    if isinstance(held, list):
        value = {"messages": held, **{name: value[name] for name in OPTIONS if name in value}}
    elif isinstance(held, str) and not blank(held):
        return Row(record.where, TEXT, held, source=_source(value))
    elif not blank(held):
        raise ValueError(f"{column} is of type {type(held).__name__}")
    for names, make in FORMS.items():
        if value.keys() >= {*names}:
            row = make(value, *(value[name] for name in names))
            return row and row._replace(where=record.where, form=" and ".join(names), source=_source(value))
    if column in value:
        return None
    raise ValueError(f"a record with {', '.join(map(repr, value)) or 'no fields'}")


def _source(value: Mapping[str, Any]) -> str | None:
    source = value.get("source")
    return source if isinstance(source, str) and source else None


def _turns(value: Mapping[str, Any], turns: Any) -> Row | None:
    system = value.get("system")
    if isinstance(turns, list) and not blank(system):
        turns = [{"role": "system", "content": system}, *turns]
    return _conversation(value, turns)


def _instruction(value: Mapping[str, Any], instruction: Any, output: Any) -> Row | None:
    """Read Alpaca's fields as LLaMA-Factory does: the input stands below the instruction, in the user's message."""
    asked = [part for part in (instruction, value.get("input")) if not blank(part)]
    if not asked or blank(output):
        return None
    messages = [] if blank(value.get("system")) else [{"role": "system", "content": value["system"]}]
    question = "\n".join(_texts(asked, "instruction and input"))
    for before, answer in [*(value.get("history") or []), (question, output)]:
        messages += [{"role": "user", "content": before}, {"role": "assistant", "content": answer}]
    return _conversation(value, messages)


def _completion(value: Mapping[str, Any], prompt: Any, completion: Any) -> Row | None:
    if blank(completion):
        return None
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(value, [*prompt, *completion])
    parts = _texts(["" if prompt is None else prompt, completion], "prompt and completion")
    return Row("", "", "".join(parts), ends=True)


def _texts(parts: Sequence[Any], names: str) -> Sequence[str]:
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{names} are of types {', '.join(type(part).__name__ for part in parts)}")
    return parts


def _conversation(value: Mapping[str, Any], messages: Any) -> Row | None:
    """Read messages with the roles that templates know; `None` if one of them has no content."""
    if blank(messages):
        return None
    if not isinstance(messages, list):
        raise ValueError(f"messages are of type {type(messages).__name__}")
    if not all(blank(value.get(name)) for name in ("image", "images")):
        raise ValueError("messages about images, which are no text")
    read = [_message(number, message) for number, message in enumerate(messages)]
    if any(message["content"] is None and not message.get("tool_calls") for message in read):
        return None
    if all(blank(message["content"]) for message in read):
        return None
    options = {name: value[name] for name in OPTIONS if value.get(name)}
    if isinstance(options.get("tools"), str):
        options["tools"] = json.loads(options["tools"])
    return Row("", "", messages=read, options=options)


FORMS: dict[tuple[str, ...], Callable[..., Row | None]] = {
    ("messages",): _conversation,
    ("conversations",): _turns,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _instruction,
}


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is of type {type(message).__name__}")
    # Tables have all fields in all rows, and null where a row has none. Templates ask whether there is a field.
    kept = {name: part for name, part in message.items() if part is not None}
    if "from" in message and "role" not in kept:
        role = kept.pop("from", None)
        kept = {"role": ROLES.get(role, role), "content": kept.pop("value", None), **kept}
    if not isinstance(kept.get("role"), str):
        raise ValueError(f"message {number} has no role")
    content = kept.setdefault("content", None)
    strange = [part for part in content if not _is_text(part)] if isinstance(content, list) else []
    if strange or not isinstance(content, str | list | None):
        raise ValueError(f"message {number} has more than text: {str(strange or content)[:80]}")
    return kept


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
