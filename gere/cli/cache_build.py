"""`gere cache build`: the anchor of a base model, ahead of training and as the training would make it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from gere import _compat
from gere.anchoring import ReadyModel, precision_name
from gere.cache import Anchor
from gere.cache.survey import describe_anchor
from gere.cli.cache_show import anchor_lines
from gere.cli.prepared import Prepared, load_model, load_tokenizer, prepare
from gere.cli.settings import read_settings
from gere.config import require
from gere.ranks import Ranks
from gere.run import ReplayRun


def build(options: argparse.Namespace) -> int:
    """Build or open the anchor, and write what it is.

    Args:
        options: As `gere.cli.cache` reads them.

    Returns:
        The exit status, 0.
    """
    started = time.monotonic()
    run = _run(options)
    with prepare(options.precision, tf32=options.tf32, cpu=options.device == "cpu") as prepared:
        ranks = _compat.ranks_of(prepared)
        tokenizer = load_tokenizer(options.tokenizer or options.model, options.pad_token)
        model = load_model(options.model, options.dtype, prepared.device)
        # before autocast is wrapped around the model, as in a training
        run.replay_set(tokenizer, ranks, model, progress=ranks.index == 0)
        there = _times(run.folder)
        run.prepare(_ready(model, prepared, ranks), tokenizer, resumed=False, progress=ranks.index == 0)
        if ranks.index == 0 and run.anchor is not None:
            _report(run.anchor, _times(run.folder) == there, time.monotonic() - started)
    return 0


def _run(options: argparse.Namespace) -> ReplayRun:
    """The replay of a training with these settings."""
    words = [f"replay_dataset={options.replay_dataset}"] if options.replay_dataset is not None else []
    kwargs = read_settings(options.config, [*words, *options.set])
    named = kwargs.get("gere_hidden_state_saving_dir", options.folder)
    same = Path(named).resolve() == options.folder.resolve()
    require(same, "gere_hidden_state_saving_dir", f"FOLDER, {options.folder}", str(named))
    run = ReplayRun(options.folder, kwargs.get("reuse_gere_hidden_state", True), None, "auto", kwargs["gere_config"])
    require(run.active, "gere_config.replay_strategy", "a strategy with an anchor", run.config.replay_strategy)
    return run


def _ready(model: Any, prepared: Prepared, ranks: Ranks) -> ReadyModel:
    accelerator = prepared.accelerator
    return ReadyModel(
        inner=accelerator.prepare_model(model, evaluation_mode=True),
        device=prepared.device,
        autocast=accelerator.autocast,
        precision=precision_name(accelerator.mixed_precision, prepared.tf32),
        fresh=True,
        ranks=ranks,
    )


def _times(folder: Path) -> dict[str, int]:
    """When each manifest was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("anchor-*/manifest.json")}


def _report(anchor: Anchor, there: bool, seconds: float) -> None:
    what = "There already" if there else "Built"
    lines = [f"{what}: {anchor.folder}, {seconds:.1f} s", *anchor_lines(describe_anchor(anchor.folder))]
    sys.stdout.write("\n".join(lines) + "\n")
