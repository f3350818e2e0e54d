"""Replay settings of a command line: a config file, `name=value` words, and their help."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from gere import _files
from gere.config import CONFIG_FIELDS, GeReArguments, argument_name, kwargs_of_section, require
from gere.errors import ConfigError

SECTION = "gere"
# JSON writes them true, false and null.
PYTHON_WORDS = {"True": True, "False": False, "None": None}


def read_kwargs(file: Path | None, words: Sequence[str]) -> dict[str, Any]:
    """Read replay settings as keyword arguments of `GeReTrainer`.

    Args:
        file: YAML or JSON with the settings, alone or in a section `gere`.
        words: `name=value`. They overrule the file, and later words overrule earlier ones.

    Raises:
        ConfigError: If the file cannot be read, a name is unknown, or a value cannot be used.
    """
    given = dict(map(_split, words))
    if file is None:
        return kwargs_of_section(given, "--set")
    section = _read_section(file)
    # Anything but settings by name is refused by `kwargs_of_section`.
    if isinstance(section, dict):
        section |= given
    return kwargs_of_section(section, f"{file}, --set")


@contextmanager
def output_errors(path: Path, what: str, option: str) -> Iterator[None]:
    """Turn the system's errors about a file that is written into a `ConfigError` that names the option."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be written.",
            where=path,
            expected="a path that this process may write to",
            found=f"{type(error).__name__}: {error.strerror or error}",
            fix=f"Give another {option}.",
        ) from error


def settings_help() -> str:
    """List the settings of `GeReConfig` with their defaults, for a command's help."""
    lines = []
    for name, field in CONFIG_FIELDS.items():
        row = f"  {name:<22}{field.metadata['help']} [{field.default}]"
        lines.append(textwrap.fill(row, 110, subsequent_indent=" " * 24))
    return "\n".join(lines)


def _split(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    require(bool(equals), "--set", "name=value without spaces, such as max_length=256", word)
    return name, _value(name, text)


def _value(name: str, text: str) -> Any:
    """Read a value as text, or as JSON if its setting asks for another type."""
    kind = get_type_hints(GeReArguments).get(argument_name(name), str)
    # JSON would turn a file name such as 12 into a number.
    if kind in (str, str | None) or get_origin(kind) is Literal:
        return text
    if text in PYTHON_WORDS:
        return PYTHON_WORDS[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # The check of the setting names it, and says what it expects.
        return text


def _read_section(file: Path) -> Any:
    try:
        loaded = _files.read_settings(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "The config file cannot be read.",
            where=file,
            expected="a .yaml, .yml or .json file of settings by name, or with a section `gere`",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the path or the file.",
        ) from error
    if isinstance(loaded, dict):
        return loaded.get(SECTION, loaded)
    return loaded
