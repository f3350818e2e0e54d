"""`gere cache build`: the anchor of a base model, ahead of training and as the training would make it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from gere import _compat
from gere.anchoring import AnchorWish, ReadyModel, find_anchor, precision_name
from gere.cache import Anchor
from gere.cache.survey import describe_anchor
from gere.cli.cache_show import anchor_lines
from gere.cli.prepared import Prepared, load_model, load_tokenizer, prepare
from gere.cli.settings import read_settings
from gere.config import GeReConfig, require
from gere.ranks import Ranks
from gere.replay import ReplaySet, load_replay_set
from gere.run import require_same_texts


def build(options: argparse.Namespace) -> int:
    """Build or open the anchor, and write what it is.

    Args:
        options: As `gere.cli.cache` reads them.

    Returns:
        The exit status, 0.
    """
    started = time.monotonic()
    wish = _wish(options)
    with prepare(options.precision, tf32=options.tf32, cpu=options.device == "cpu") as prepared:
        ranks = _compat.ranks_of(prepared)
        tokenizer = load_tokenizer(options.tokenizer or options.model, options.pad_token)
        replay = _replay_set(wish, tokenizer, ranks)
        model = _ready(load_model(options.model, options.dtype), prepared, ranks)
        there = _times(wish.folder)
        anchor = find_anchor(wish, model, replay, resumed=False, progress=ranks.index == 0)
        if ranks.index == 0:
            _report(anchor, _times(wish.folder) == there, time.monotonic() - started)
    return 0


def _wish(options: argparse.Namespace) -> AnchorWish:
    words = [f"replay_dataset={options.replay_dataset}"] if options.replay_dataset is not None else []
    kwargs = read_settings(options.config, [*words, *options.set])
    config: GeReConfig = kwargs["gere_config"]
    buildable = config.replay_strategy != "none"
    require(buildable, "gere_config.replay_strategy", "a strategy with an anchor", config.replay_strategy)
    named = Path(kwargs.get("gere_hidden_state_saving_dir", options.folder))
    same = named.resolve() == options.folder.resolve()
    require(same, "gere_hidden_state_saving_dir", f"FOLDER, {options.folder}", str(named))
    reuse = kwargs.get("reuse_gere_hidden_state", True)
    require(isinstance(reuse, bool), "reuse_gere_hidden_state", "true or false", reuse)
    return AnchorWish(options.folder, reuse, config, checkpoint=None)


def _replay_set(wish: AnchorWish, tokenizer: Any, ranks: Ranks) -> ReplaySet:
    replay = ranks.first_here_first(lambda: load_replay_set(wish.config, tokenizer, wish.folder))
    fields = ranks.gather(replay.fields)
    ranks.together(lambda: require_same_texts(fields))
    return replay


def _ready(model: Any, prepared: Prepared, ranks: Ranks) -> ReadyModel:
    accelerator = prepared.accelerator
    placed = model if getattr(model, "is_quantized", False) else model.to(prepared.device)
    return ReadyModel(
        inner=accelerator.prepare_model(placed, evaluation_mode=True),
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
