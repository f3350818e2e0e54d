"""`gere cache build`: make the anchor of a base model ahead of training, byte for byte as the training would."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from gere import _compat
from gere.cache.inventory import describe_anchor
from gere.cli.cache_folder import anchor_lines
from gere.cli.loading import Prepared, load_model, load_tokenizer, prepare
from gere.cli.settings import read_kwargs
from gere.config import require
from gere.ranks import Ranks
from gere.session.anchor import ReadyModel, find_anchor, precision_name
from gere.session.plan import ReplaySettings, make_plan, replay_settings


def build(options: argparse.Namespace) -> int:
    """Build the anchor, or open it if it is there, and describe it.

    Args:
        options: As `gere.cli.cache` reads them.

    Returns:
        The exit status, 0.
    """
    started = time.monotonic()
    settings = _settings(options)
    with prepare(options.precision, tf32=options.tf32, cpu=options.device == "cpu") as prepared:
        ranks = _compat.ranks_of(prepared)
        leads = ranks.index == 0
        tokenizer = load_tokenizer(options.tokenizer or options.model, options.pad_token)
        model = load_model(options.model, options.dtype, prepared.device)
        # The texts of `replay_dataset="self"` are sampled without autocast in a training, so before `_ready` here.
        plan = make_plan(settings, tokenizer, model, ranks, checkpoint=None, progress=leads)
        before = _written(settings.folder)
        ready = _ready(model, prepared, ranks)
        anchor = find_anchor(settings, ready, plan.replay, checkpoint=None, progress=leads).anchor
        if leads:
            done = "There already" if _written(settings.folder) == before else "Built"
            first = f"{done}: {anchor.folder}, {time.monotonic() - started:.1f} s"
            sys.stdout.write("\n".join([first, *anchor_lines(describe_anchor(anchor.folder))]) + "\n")
    return 0


def _settings(options: argparse.Namespace) -> ReplaySettings:
    """The replay settings of a training with these options."""
    words = [*options.set]
    if options.replay_dataset is not None:
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


def _ready(model: Any, prepared: Prepared, ranks: Ranks) -> ReadyModel:
    accelerator = prepared.accelerator
    return ReadyModel(
        inner=accelerator.prepare_model(model, evaluation_mode=True),
        device=prepared.device,
        autocast=accelerator.autocast,
        precision=precision_name(accelerator.mixed_precision, prepared.tf32),
        ranks=ranks,
    )


def _written(folder: Path) -> dict[str, int]:
    """When the manifest of each anchor was written; rebuilding an anchor keeps its name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("anchor-*/manifest.json")}
