"""Replay settings from a command line: a config file, `name=value` words, and what each setting means."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gere.arguments import CONFIG_FIELDS, TRAINER_FIELDS, GeReArguments, kwargs_of_section
from gere.errors import ConfigError

SECTION = "gere"
FIELD_OF = {**TRAINER_FIELDS, **{name: f"gere_{name}" for name in CONFIG_FIELDS}}
WORDS = {"True": True, "False": False, "None": None}


def read_settings(file: Path | None, words: Sequence[str]) -> dict[str, Any]:
    """Read replay settings.

    Args:
        file: YAML or JSON; the settings stand in its section `gere`, or alone.
        words: `name=value`, which come after those of the file and before each other from the left.

    Returns:
        Keyword arguments of `GeReTrainer`, as `kwargs_of_section` gives them.

    Raises:
        ConfigError: If the file cannot be read, a name is unknown, or a value cannot be used.
    """
    section = {} if file is None else _read_section(file)
    where = "--set" if file is None else f"{file}, --set"
    if not isinstance(section, dict):
        return kwargs_of_section(section, where)
    return kwargs_of_section({**section, **dict(map(_split, words))}, where)


def settings_help() -> str:
    """The settings of `GeReConfig`, one a line."""
    about = {field.name: field for field in dataclasses.fields(GeReArguments)}
    rows = [(name, about[FIELD_OF[name]]) for name in CONFIG_FIELDS]
    return "\n".join(f"  {name:<22}{field.metadata['help']} [{field.default}]" for name, field in rows)


def _split(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(
            "A setting has no value.",
            where="--set",
            expected="name=value, such as max_length=256",
            found=repr(word),
            fix="Write the name, an equals sign and the value, with no space between.",
        )
    return name, _value(name, text)


def _value(name: str, text: str) -> Any:
    """A value as its setting has it: text, or JSON where another type is asked for."""
    hints = get_type_hints(GeReArguments)
    if name not in FIELD_OF or _kinds(hints[FIELD_OF[name]]) <= {str, NoneType}:
        return text
    try:
        return WORDS[text] if text in WORDS else json.loads(text)
    except ValueError:
        return text


def _kinds(hint: Any) -> set[Any]:
    """Types that a hint allows."""
    if get_origin(hint) is Literal:
        return {type(choice) for choice in get_args(hint)}
    members = get_args(hint) if NoneType in get_args(hint) or get_origin(hint) is None else ()
    return set().union(*map(_kinds, members)) if members else {get_origin(hint) or hint}


def _read_section(file: Path) -> Any:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        loaded = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "The config file cannot be read.",
            where=file,
            expected="a .yaml, .yml or .json file of settings by name, or with a section `gere`",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the path or the file.",
        ) from error
    return loaded[SECTION] if isinstance(loaded, dict) and SECTION in loaded else loaded
