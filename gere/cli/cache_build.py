"""`gere cache build`: make the anchor of a base model ahead of training, byte for byte as the training would."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from transformers import TrainingArguments

from gere import _compat
from gere.cache.inventory import describe_anchor
from gere.cli.cache_folder import anchor_lines
from gere.cli.loading import load_model, load_tokenizer
from gere.cli.settings import read_kwargs
from gere.config import require
from gere.errors import ConfigError, UnsupportedSettingError
from gere.session.anchor import ReadyModel, find_anchor, look_at, precision_name
from gere.session.plan import ReplaySettings, make_plan, replay_settings


def build(options: argparse.Namespace) -> int:
    """Build the anchor, or open it if it is there, describe it, and return the exit status."""
    started = time.monotonic()
    settings = _settings(options)
    with _accelerated(options) as (accelerator, device):
        ranks = _compat.ranks_here()
        leads = ranks.index == 0
        model = load_model(options.model, options.dtype, device)
        named = ("--tokenizer", options.tokenizer) if options.tokenizer else ("--model", options.model)
        tokenizer = load_tokenizer(named[1], options.pad_token, option=named[0])
        # Before `prepare_model`, which adds autocast: a training samples the texts of "self" without it.
        plan = make_plan(settings, tokenizer, model, ranks, checkpoint=None, progress=leads)
        before = _written(settings.folder)
        ready = ReadyModel(
            inner=accelerator.prepare_model(model, evaluation_mode=True),
            device=device,
            autocast=accelerator.autocast,
            precision=precision_name(accelerator.mixed_precision, options.tf32),
            ranks=ranks,
        )
        layout = look_at(ready, plan.replay)
        anchor = find_anchor(settings, ready, layout, plan.replay, checkpoint=None, progress=leads).anchor
        if leads:
            done = "There already" if _written(settings.folder) == before else "Built"
            first = f"{done}: {anchor.folder}, {time.monotonic() - started:.1f} s"
            sys.stdout.write("\n".join([first, *anchor_lines(describe_anchor(anchor.folder))]) + "\n")
    return 0


def _settings(options: argparse.Namespace) -> ReplaySettings:
    """Read the replay settings that a training with these options has."""
    words = [*options.set]
    if options.replay_dataset is not None:
        # First, so that --set overrules it.
        words.insert(0, f"replay_dataset={options.replay_dataset}")
    kwargs = read_kwargs(options.config, words)
    folder = kwargs.get("gere_hidden_state_saving_dir", options.folder)
    same = Path(folder).resolve() == options.folder.resolve()
    require(same, "gere_hidden_state_saving_dir", f"FOLDER, {options.folder}", str(folder))
    reuse = kwargs.get("reuse_gere_hidden_state", True)
    # Neither the rows of a step nor the weight decide what is in an anchor.
    settings = replay_settings(options.folder, reuse, None, "auto", kwargs["gere_config"])
    strategy = settings.config.replay_strategy
    require(settings.active, "gere_config.replay_strategy", "a strategy with an anchor", strategy)
    return settings


@contextmanager
def _accelerated(options: argparse.Namespace) -> Iterator[tuple[Any, torch.device]]:
    """Set up this process, or all that torchrun started, by the rules of the trainer."""
    try:
        args = TrainingArguments(
            output_dir="unused",
            bf16=options.precision == "bf16",
            fp16=options.precision == "fp16",
            # False would switch it off, and a training without this setting leaves it as it is.
            tf32=options.tf32 or None,
            use_cpu=options.device == "cpu",
            report_to=[],
        )
        # Read before `Accelerator` is made: it sets up the processes as the trainer does.
        device = args.device
        accelerator = Accelerator(mixed_precision=options.precision)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            "This machine cannot compute in the precision of the training.",
            where="--precision, --tf32, --device",
            found=f"{type(error).__name__}: {error}",
            fix="Build the anchor on a machine like the one that trains; if that sets use_cpu, say --device cpu.",
        ) from error
    try:
        kind = accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise UnsupportedSettingError(
                "The command builds with whole weights in each process.",
                where="accelerate's launcher",
                expected="one process, torchrun, or accelerate launch without DeepSpeed and FSDP",
                found=kind,
                fix="Start it by torchrun, or let the training build the anchor, which has the same key.",
            )
        yield accelerator, device
    finally:
        PartialState().destroy_process_group()


def _written(folder: Path) -> dict[str, int]:
    """Return when the manifest of each anchor was written."""
    # By time, not by name: an anchor that is rebuilt keeps its name.
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("anchor-*/manifest.json")}
