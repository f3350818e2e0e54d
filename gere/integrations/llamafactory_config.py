"""LLaMA-Factory's config with a section for replay: read, checked, and split."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from gere._files import open_text
from gere._log import logger
from gere.config import kwargs_of_section
from gere.errors import ConfigError, GeReError, UnsupportedSettingError

SECTION = "gere"
# Where each stage looks up its trainer class when it runs.
STAGES = {
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "pt": ("llamafactory.train.pt.workflow", "CustomTrainer"),
}


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config file by the rules of LLaMA-Factory; `overrides` are `key=value`, a dot leads into a section."""
    if not path.is_file():
        raise _unreadable(path, "no file")
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise _unreadable(path, "another kind of file")
    # LLaMA-Factory reads by OmegaConf, which knows numbers such as 1e-4 that PyYAML takes for text.
    reader = needed("omegaconf").OmegaConf
    try:
        with open_text(path) as stream:
            content: Any = stream.read()
        if path.suffix == ".json":
            content = json.loads(content)
        loaded = reader.create(content)
    except (ValueError, needed("yaml").YAMLError) as error:
        raise _unreadable(path, error) from error
    if not reader.is_dict(loaded):
        raise _unreadable(path, "a list")
    merged: dict[str, Any] = reader.to_container(reader.merge(loaded, reader.from_cli([*overrides])))
    return merged


def split_config(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Split a config into LLaMA-Factory's settings, its stage, and the keyword arguments of `GeReTrainer`.

    `where` names the place of the replay section in messages.
    """
    if SECTION not in config:
        raise ConfigError(
            "The config has no section for replay.",
            where=where,
            expected=f"{SECTION}: with settings such as num_interpolate_per_batch: 4, replay_dataset: texts.jsonl",
            found=f"no key {SECTION}",
            fix=f"Add the section; `{SECTION}: {{}}` takes every default. Without replay, use llamafactory-cli.",
        )
    settings = dict(config)
    section = settings.pop(SECTION)
    # Ray, Megatron (MCA) and V1 train by classes of their own, which would not replay and not say so.
    for name in ("USE_RAY", "USE_MCA", "USE_V1"):
        if enabled(name):
            raise _no_replay(name, "not set", "set")
    if settings.get("use_hyper_parallel"):
        raise _no_replay("use_hyper_parallel", "not set", "set")
    stage = settings.get("stage", "sft")
    if stage not in STAGES:
        raise _no_replay("stage", " or ".join(STAGES), repr(stage))
    return settings, stage, kwargs_of_section(section, where)


def enabled(name: str, default: str = "0") -> bool:
    """Return whether an environment variable is on, by the words that LLaMA-Factory knows."""
    return os.environ.get(name, default).lower() in {"true", "y", "1"}


def needed(name: str) -> Any:
    """Import a module of LLaMA-Factory or of its config reader."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Another missing module is a fault of the environment, which its own error names best.
        if str(error.name).split(".")[0] not in {"llamafactory", "omegaconf"}:
            raise
        what = "LLaMA-Factory is not installed in this environment."
        raise GeReError(what, where=name, fix="pip install llamafactory==0.9.5") from error


def let_audio_wait() -> None:
    """Let LLaMA-Factory start without torchaudio, which it imports at once and which only audio needs.

    torchaudio on PyPI is made for torch with CUDA: next to torch for CPUs it is there and cannot be loaded.
    """
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError) as error:
        sys.modules["torchaudio"] = _NoAudio(str(error))
        logger.warning("torchaudio cannot be imported, so that audio cannot be read: %s", error)


class _NoAudio(ModuleType):
    """Stands for torchaudio, and says what is missing when it is used."""

    def __init__(self, why: str) -> None:
        super().__init__("torchaudio")
        self.__spec__ = ModuleSpec("torchaudio", None)  # transformers looks for the spec of each package
        self._why = why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # inspect and importlib ask every module
        raise GeReError(
            "LLaMA-Factory reads audio by torchaudio, which cannot be imported.",
            where=f"torchaudio.{name}",
            expected="torchaudio of the same kind as torch (CPU or CUDA)",
            found=self._why,
            fix="pip install torchaudio, from where torch was installed. Text needs none.",
        )


def _no_replay(where: str, expected: str, found: str) -> UnsupportedSettingError:
    return UnsupportedSettingError(
        "LLaMA-Factory would train with a class that cannot replay.",
        where=where,
        expected=expected,
        found=found,
        fix=f"Change it; or take out the section {SECTION} and use llamafactory-cli for training without replay.",
    )


def _unreadable(path: Path, found: object) -> ConfigError:
    return ConfigError(
        "The config cannot be read.",
        where=path,
        expected="a .yaml, .yml or .json file of settings by name",
        found=found,
        fix="Check the path; it is relative to the folder in which the command is started.",
    )
