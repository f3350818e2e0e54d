"""Write docs/settings.md from the settings in gere/config.py: python docs/make_settings.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gere.config import CONFIG_FIELDS, TRAINER_FIELDS

PAGE = """# Settings

<!-- Made from gere/config.py by docs/make_settings.py. Change the help there. -->

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


def settings_page() -> str:
    """Return the content of docs/settings.md."""
    return PAGE.format(trainer=_table(TRAINER_FIELDS), config=_table(CONFIG_FIELDS))


def _table(fields: Mapping[str, dataclasses.Field[Any]]) -> str:
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        rules = field.metadata
        values = ", ".join(f'`"{choice}"`' for choice in rules["choices"])
        if rules["least"] is not None:
            values = f"whole number >= {rules['least']}"
        if rules["positive"]:
            values = "number > 0"
        if rules["example"] is not None:
            values = f"{values}, such as `{json.dumps(rules['example'])}`".removeprefix(", ")
        default = field.default
        if isinstance(default, str):
            default = f'"{default}"'
        lines.append(f"| `{name}` | `{default}` | {values} | {rules['help']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(settings_page(), encoding="utf-8")
