"""Replay settings of a command line: a config file, `name=value` words, their help, and the page docs/settings.md."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from gere import _files
from gere.config import CONFIG_FIELDS, TRAINER_FIELDS, GeReArguments, argument_name, kwargs_of_section
from gere.errors import ConfigError

SECTION = "gere"
PYTHON_WORDS = {"True": True, "False": False, "None": None}
PAGE = """# Settings

<!-- Made from gere/config.py by gere.cli.settings.settings_page. Change the help there. -->

| where | how |
|---|---|
| Python | `GeReTrainer(..., num_interpolate_per_batch=4, gere_config=GeReConfig(max_length=256))` |
| a script with `HfArgumentParser` and `GeReArguments` | `--gere_num_interpolate_per_batch 4 --gere_max_length 256` |
| section `gere` of a config file (LLaMA-Factory, Axolotl, `gere sequence`) | `max_length: 256` |
| `gere cache build` | `--config FILE` with such a section, `--set max_length=256` |

`reuse_gere_hidden_state` is `--gere_reuse_hidden_state` for `HfArgumentParser`.

## Arguments of `GeReTrainer`

{trainer}

`gere_config` takes a `GeReConfig` with all other settings.

## Fields of `GeReConfig`

{config}
"""


def read_kwargs(file: Path | None, words: Sequence[str]) -> dict[str, Any]:
    """Read replay settings.

    Args:
        file: YAML or JSON with the settings, alone or in a section `gere`.
        words: `name=value`. They overrule the file, and later words overrule earlier ones.

    Returns:
        Keyword arguments of `GeReTrainer`, as `kwargs_of_section` gives them.

    Raises:
        ConfigError: If the file cannot be read, a name is unknown, or a value cannot be used.
    """
    if file is None:
        return kwargs_of_section(dict(map(_split, words)), "--set")
    section = _read_section(file)
    if isinstance(section, dict):
        section |= dict(map(_split, words))
    return kwargs_of_section(section, f"{file}, --set")


def settings_help() -> str:
    """The settings of `GeReConfig` with their defaults, for a command's help."""
    rows = [f"  {name:<22}{field.metadata['help']} [{field.default}]" for name, field in CONFIG_FIELDS.items()]
    return "\n".join(textwrap.fill(row, 110, subsequent_indent=" " * 24) for row in rows)


def settings_page() -> str:
    """Content of docs/settings.md."""
    return PAGE.format(trainer="\n".join(_table(TRAINER_FIELDS)), config="\n".join(_table(CONFIG_FIELDS)))


def _table(fields: Mapping[str, dataclasses.Field[Any]]) -> Iterator[str]:
    yield "| setting | default | values | meaning |\n|---|---|---|---|"
    for name, field in fields.items():
        rules = field.metadata
        values = ", ".join(f'`"{choice}"`' for choice in rules["choices"])
        if rules["least"] is not None:
            values = f"whole number >= {rules['least']}"
        if rules["positive"]:
            values = "number > 0"
        if rules["example"] is not None:
            values = f"{values}, such as `{json.dumps(rules['example'])}`".removeprefix(", ")
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        yield f"| `{name}` | `{default}` | {values} | {rules['help']} |"


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
    """Read a value as text, or as JSON if its setting asks for another type."""
    kind = get_type_hints(GeReArguments).get(argument_name(name), str)
    # JSON would turn a file name such as 12 into a number.
    if kind in (str, str | None) or get_origin(kind) is Literal:
        return text
    try:
        return PYTHON_WORDS[text] if text in PYTHON_WORDS else json.loads(text)
    except ValueError:
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
    return loaded[SECTION] if isinstance(loaded, dict) and SECTION in loaded else loaded
