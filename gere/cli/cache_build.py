"""`gere cache build`: the anchor of a base model, ahead of training and as the training would make it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from gere import _compat
from gere.cache import Anchor
from gere.cache.inventory import describe_anchor
from gere.cli.cache_show import anchor_lines
from gere.cli.loading import Prepared, load_model, load_tokenizer, prepare
from gere.cli.settings import read_settings
from gere.config import require
from gere.ranks import Ranks
from gere.session import plan
from gere.session.anchor import ReadyModel, find_anchor, precision_name
from gere.session.plan import ReplaySettings


def build(options: argparse.Namespace) -> int:
    """Build or open the anchor, and write what it is.

    Args:
        options: As `gere.cli.cache` reads them.

    Returns:
        The exit status, 0.
    """
    started = time.monotonic()
    settings = _settings(options)
    with prepare(options.precision, tf32=options.tf32, cpu=options.device == "cpu") as prepared:
        ranks = _compat.ranks_of(prepared)
        progress = ranks.index == 0
        tokenizer = load_tokenizer(options.tokenizer or options.model, options.pad_token)
        model = load_model(options.model, options.dtype, prepared.device)
        # Texts are sampled before autocast is wrapped around the model, as in a training.
        replay_plan = plan.make_plan(settings, tokenizer, model, ranks, checkpoint=None, progress=progress)
        before = _times(settings.folder)
        ready = _ready(model, prepared, ranks)
        found = find_anchor(settings, ready, replay_plan.replay, checkpoint=None, progress=progress)
        if ranks.index == 0:
            _report(found.anchor, _times(settings.folder) == before, time.monotonic() - started)
    return 0


def _settings(options: argparse.Namespace) -> ReplaySettings:
    """The replay settings of a training with these options."""
    words = [f"replay_dataset={options.replay_dataset}"] if options.replay_dataset is not None else []
    kwargs = read_settings(options.config, [*words, *options.set])
    named = kwargs.get("gere_hidden_state_saving_dir", options.folder)
    same = Path(named).resolve() == options.folder.resolve()
    require(same, "gere_hidden_state_saving_dir", f"FOLDER, {options.folder}", str(named))
    reuse = kwargs.get("reuse_gere_hidden_state", True)
    settings = plan.read_settings(options.folder, reuse, None, "auto", kwargs["gere_config"])
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


def _times(folder: Path) -> dict[str, int]:
    """When each manifest was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("anchor-*/manifest.json")}


def _report(anchor: Anchor, there: bool, seconds: float) -> None:
    what = "There already" if there else "Built"
    lines = [f"{what}: {anchor.folder}, {seconds:.1f} s", *anchor_lines(describe_anchor(anchor.folder))]
    sys.stdout.write("\n".join(lines) + "\n")
