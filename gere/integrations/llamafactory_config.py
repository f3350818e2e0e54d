"""LLaMA-Factory's config with a section for replay: read, checked, and taken apart."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gere.config import kwargs_of_section
from gere.errors import ConfigError, GeReError, UnsupportedSettingError
from gere.integrations.torchrun import enabled

SECTION = "gere"
# Where each stage looks up its trainer class when it runs.
STAGES = {
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "pt": ("llamafactory.train.pt.workflow", "CustomTrainer"),
}


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config file by the rules of LLaMA-Factory.

    Args:
        path: A `.yaml`, `.yml` or `.json` file.
        overrides: `key=value` for settings to replace or add; a dot leads into a section.

    Raises:
        ConfigError: If there is no such file, or it holds no settings.
        GeReError: If LLaMA-Factory's config reader is not installed.
    """
    if not path.is_file() or path.suffix not in {".yaml", ".yml", ".json"}:
        raise _unreadable(path, "another kind of file" if path.is_file() else "no file")
    reader = needed("omegaconf").OmegaConf
    try:
        text = path.read_text(encoding="utf-8")
        loaded = reader.create(json.loads(text) if path.suffix == ".json" else text)
    except (ValueError, needed("yaml").YAMLError) as error:
        raise _unreadable(path, error) from error
    if not reader.is_dict(loaded):
        raise _unreadable(path, "a list")
    merged: dict[str, Any] = reader.to_container(reader.merge(loaded, reader.from_cli([*overrides])))
    return merged


def split_config(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Take the replay out of a config.

    Args:
        config: LLaMA-Factory's settings, and those of replay under `gere`.
        where: The place of the section, for messages.

    Returns:
        LLaMA-Factory's settings, its stage, and the keyword arguments of `GeReTrainer`.

    Raises:
        ConfigError: If there is no section, a name in it is unknown, or a value cannot be used.
        UnsupportedSettingError: If the run would not come to a trainer that can replay.
    """
    if SECTION not in config:
        raise ConfigError(
            "The config has no section for replay.",
            where=where,
            expected=f"{SECTION}: with settings such as num_interpolate_per_batch: 4, replay_dataset: texts.jsonl",
            found=f"no key {SECTION}",
            fix=f"Add the section; `{SECTION}: {{}}` takes every default. Without replay, use llamafactory-cli.",
        )
    settings = {name: value for name, value in config.items() if name != SECTION}
    stage = settings.get("stage", "sft")
    ways_around = [name for name in ("USE_RAY", "USE_MCA", "USE_V1") if enabled(name)]
    ways_around += ["use_hyper_parallel"] if settings.get("use_hyper_parallel") else []
    if stage not in STAGES or ways_around:
        raise UnsupportedSettingError(
            "LLaMA-Factory would train with a class that cannot replay.",
            where=", ".join(ways_around) or "stage",
            expected="not set" if ways_around else " or ".join(STAGES),
            found="set" if ways_around else repr(stage),
            fix=f"Change it; or take out the section {SECTION} and use llamafactory-cli for training without replay.",
        )
    return settings, stage, kwargs_of_section(config[SECTION], where)


def needed(name: str) -> Any:
    """A module of LLaMA-Factory or of its config reader.

    Raises:
        GeReError: If LLaMA-Factory is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in {"llamafactory", "omegaconf"}:
            raise
        what = "LLaMA-Factory is not installed in this environment."
        raise GeReError(what, where=name, fix="pip install llamafactory==0.9.5") from error


def _unreadable(path: Path, found: object) -> ConfigError:
    return ConfigError(
        "The config cannot be read.",
        where=path,
        expected="a .yaml, .yml or .json file of settings by name",
        found=found,
        fix="Check the path; it is relative to the folder in which the command is started.",
    )
