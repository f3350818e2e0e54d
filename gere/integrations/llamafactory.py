"""`gere-llamafactory train config.yaml`: LLaMA-Factory's own training, unchanged, with replay around its trainer."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gere.arguments import kwargs_of_section
from gere.errors import ConfigError, GeReError, UnsupportedSettingError
from gere.integrations.torchrun import enabled, is_worker, torchrun_options, worker_environment

SECTION = "gere"
# Where each stage looks up its trainer class when it runs.
STAGES = {
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "pt": ("llamafactory.train.pt.workflow", "CustomTrainer"),
}


def run(config: Mapping[str, Any], callbacks: Sequence[Any] | None = None) -> None:
    """Train by LLaMA-Factory with replay, in this process.

    Args:
        config: LLaMA-Factory's settings, and under `gere` those of replay: the arguments of `GeReTrainer` and the
            fields of `GeReConfig`.
        callbacks: Callbacks for its trainer.

    Raises:
        ConfigError: If there is no `gere`, a name in it is unknown, or a value cannot be used.
        UnsupportedSettingError: If the run would not come to a trainer that can replay.
        GeReError: If LLaMA-Factory is not installed.

    Example:
        >>> run({"stage": "sft", "dataset": "yelp", "gere": {"num_interpolate_per_batch": 4}})  # doctest: +SKIP
    """
    settings, stage, kwargs = _split(config, f"config, section {SECTION}")
    run_exp = _import("llamafactory.train.tuner").run_exp
    with _replay_in(stage, kwargs):
        run_exp(settings, list(callbacks or []))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `gere-llamafactory`; starts `torchrun` where `llamafactory-cli` would.

    Args:
        arguments: The words after the program's name; `None` for those of this process.

    Raises:
        SystemExit: With the message of what `run` would raise, before any process is started.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, options.overrides)
        _split(config, f"{options.config}, section {SECTION}")
        misc = _import("llamafactory.extras.misc")
    except GeReError as error:
        parser.exit(2, f"{error}\n")
    devices = misc.get_device_count()
    if _starts_processes(devices):
        own = ["-m", "gere.integrations.llamafactory", "train", str(options.config), *options.overrides]
        launch = torchrun_options(os.environ, devices, misc.find_available_port())
        command = [sys.executable, "-m", "torch.distributed.run", *launch, *own]
        # Takes the place of this process, so that signals and the exit code need nobody to pass them on.
        os.execve(sys.executable, command, worker_environment(os.environ))  # noqa: S606
    run(config)


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
    reader = _import("omegaconf").OmegaConf
    try:
        text = path.read_text(encoding="utf-8")
        loaded = reader.create(json.loads(text) if path.suffix == ".json" else text)
    except (ValueError, _import("yaml").YAMLError) as error:
        raise _unreadable(path, error) from error
    if not reader.is_dict(loaded):
        raise _unreadable(path, "a list")
    merged: dict[str, Any] = reader.to_container(reader.merge(loaded, reader.from_cli([*overrides])))
    return merged


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gere-llamafactory", description="LLaMA-Factory's training with replay.")
    train = parser.add_subparsers(required=True, metavar="train").add_parser("train", help="train by a config file")
    train.add_argument("config", type=Path, help="YAML or JSON as for llamafactory-cli, with a section gere")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings instead of those of the config")
    return parser


@contextmanager
def _replay_in(stage: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Give a stage the trainer class with replay for a while."""
    from gere.trainer import gere_trainer  # torch and transformers, which a refused config should not wait for

    module, name = _import(STAGES[stage][0]), STAGES[stage][1]
    parent = getattr(module, name)
    replaying: Any = gere_trainer(parent)
    setattr(module, name, functools.partial(replaying, **kwargs))
    try:
        yield
    finally:
        setattr(module, name, parent)


def _split(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """LLaMA-Factory's settings, its stage, and the keyword arguments of replay."""
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


def _starts_processes(devices: int) -> bool:
    """Whether LLaMA-Factory would call torchrun here."""
    return not is_worker() and (enabled("FORCE_TORCHRUN") or (devices > 1 and not enabled("USE_KT")))


def _import(name: str) -> Any:
    """A module of LLaMA-Factory or of its config reader."""
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


if __name__ == "__main__":
    main()
