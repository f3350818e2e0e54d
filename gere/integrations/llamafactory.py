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
from gere.integrations.llamafactory_config import (
    SECTION,
    STAGES,
    enabled,
    let_audio_wait,
    needed,
    read_config,
    split_config,
)


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
    let_audio_wait()
    run_exp = needed("llamafactory.train.tuner").run_exp
    with _replay_in(stage, kwargs):
        run_exp(settings, list(callbacks or []))


@contextmanager
def _replay_in(stage: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Give a stage the trainer class with replay for a while."""
    # Imports torch and transformers, which a refused config should not wait for.
    from gere.trainer import gere_trainer

    place, name = STAGES[stage]
    module = needed(place)
    parent = getattr(module, name)
    replaying: Any = gere_trainer(parent)
    # LLaMA-Factory has no setting for its trainer class, and looks it up in this module when a stage runs.
    setattr(module, name, functools.partial(replaying, **kwargs))
    try:
        yield
    finally:
        setattr(module, name, parent)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `gere-llamafactory`; start `torchrun` where `llamafactory-cli` would.

    Args:
        arguments: The words after the program's name; `None` for those of this process.

    Raises:
        SystemExit: With the message of what `run` would raise, before any process is started.
    """
    parser = argparse.ArgumentParser(prog="gere-llamafactory", description="LLaMA-Factory's training with replay.")
    train = parser.add_subparsers(required=True, metavar="train").add_parser("train", help="train by a config file")
    train.add_argument("config", type=Path, help="YAML or JSON as for llamafactory-cli, with a section gere")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings instead of those of the config")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, options.overrides)
        # Checked here, too: each of many processes would end in a traceback.
        split_config(config, f"{options.config}, section {SECTION}")
        misc = needed("llamafactory.extras.misc")
    except GeReError as error:
        parser.exit(2, f"{error}\n")
    devices = misc.get_device_count()
    # `LOCAL_RANK` is there in a process that torchrun has started.
    if "LOCAL_RANK" not in os.environ and (enabled("FORCE_TORCHRUN") or (devices > 1 and not enabled("USE_KT"))):
        own = ["-m", "gere.integrations.llamafactory", "train", str(options.config), *options.overrides]
        launch = torchrun_options(os.environ, devices, misc.find_available_port())
        command = [sys.executable, "-m", "torch.distributed.run", *launch, *own]
        # Takes the place of this process, so that signals and the exit code need nobody to pass them on.
        os.execve(sys.executable, command, worker_environment(os.environ))  # noqa: S606
    run(config)


def torchrun_options(environ: Mapping[str, str], devices: int, free_port: int) -> list[str]:
    """Make the options of `torchrun` from the variables that LLaMA-Factory reads, for `devices` of this machine.

    `free_port` is used if none is named. `RDZV_ID` makes the start elastic.
    """
    address, port = environ.get("MASTER_ADDR", "127.0.0.1"), environ.get("MASTER_PORT", str(free_port))
    options = {"nproc_per_node": environ.get("NPROC_PER_NODE", str(max(1, devices)))}
    options["nnodes"] = environ.get("NNODES", "1")
    if "RDZV_ID" in environ:
        if "MIN_NNODES" in environ and "MAX_NNODES" in environ:
            options["nnodes"] = f"{environ['MIN_NNODES']}:{environ['MAX_NNODES']}"
        options |= {"rdzv_backend": "c10d", "rdzv_id": environ["RDZV_ID"], "rdzv_endpoint": f"{address}:{port}"}
        options["max_restarts"] = environ.get("MAX_RESTARTS", "0")
    else:
        options |= {"master_addr": address, "master_port": port, "node_rank": environ.get("NODE_RANK", "0")}
    return [f"--{name}={value}" for name, value in options.items()]


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the workers, with the variables that LLaMA-Factory sets for them."""
    if not enabled("OPTIM_TORCH", "1"):
        return {**environ}
    return {**environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}


if __name__ == "__main__":
    main()
