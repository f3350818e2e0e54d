"""`gere-llamafactory train config.yaml`: LLaMA-Factory's own training, unchanged, with replay around its trainer."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gere.errors import GeReError
from gere.integrations.llamafactory_config import SECTION, STAGES, needed, read_config, split_config
from gere.integrations.torchrun import enabled, is_worker, torchrun_options, worker_environment


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
    settings, stage, kwargs = split_config(config, f"config, section {SECTION}")
    run_exp = needed("llamafactory.train.tuner").run_exp
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
        split_config(config, f"{options.config}, section {SECTION}")
        misc = needed("llamafactory.extras.misc")
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

    module, name = needed(STAGES[stage][0]), STAGES[stage][1]
    parent = getattr(module, name)
    replaying: Any = gere_trainer(parent)
    setattr(module, name, functools.partial(replaying, **kwargs))
    try:
        yield
    finally:
        setattr(module, name, parent)


def _starts_processes(devices: int) -> bool:
    """Whether LLaMA-Factory would call torchrun here."""
    return not is_worker() and (enabled("FORCE_TORCHRUN") or (devices > 1 and not enabled("USE_KT")))


if __name__ == "__main__":
    main()
