"""`gere blend`: measure the line from base to tuned weights, choose a share, and write the model there."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from gere.blend.choice import Point, choose, grid, largest_within
from gere.blend.files import Stored, base_name, read_base, read_tuned
from gere.blend.folder import require_new, write_blend
from gere.blend.match import find_line
from gere.blend.measure import Measured, Walk, require_finite
from gere.blend.pairs import Line
from gere.cli.blend_plot import draw, figure_class
from gere.cli.loading import load_model, load_tokenizer, measuring_device
from gere.config import require
from gere.errors import GeReError, MissingPackageError
from gere.evaluation.examples import read_examples
from gere.evaluation.general import GeneralChange
from gere.replay.texts import Source, read_rows


def blend(options: argparse.Namespace) -> int:
    """Measure, choose and write as the options say, and return the exit status."""
    tuned = read_tuned(options.tuned)
    base = _base_name(tuned, options)
    if options.out is not None:
        # Before the line is measured, which takes long.
        require_new(options.out, [tuned.name, *([base] if base else [])], force=options.force)
    if options.plot is not None:
        figure_class()
    line = find_line(tuned, lambda: _find_base(tuned, options))
    _say(*line.notes)
    walk = _walk(line, base, options)
    point = Point(options.share, None, None)
    if walk is not None:
        point = _measure(walk, options)
    if options.out is not None:
        write_blend(line, point.share, options.out, _about(point, base, options), force=options.force)
        _say(f"wrote share {point.share:g} to {options.out}")
    return 0


def _base_name(tuned: Stored, options: argparse.Namespace) -> str | None:
    """Return the name of the base; `None` for LoRA that names none and needs none."""
    try:
        return base_name(tuned, options.base)
    except GeReError:
        if not tuned.is_adapter or options.base or options.texts or options.task_file:
            raise
        return None


def _find_base(tuned: Stored, options: argparse.Namespace) -> Stored:
    revision = tuned.config.get("revision") if options.base is None else None
    return read_base(base_name(tuned, options.base), revision, quantized=tuned.is_adapter)


def _walk(line: Line, base: str | None, options: argparse.Namespace) -> Walk | None:
    """Load what is needed to measure; `None` if nothing is to be measured."""
    texts: list[Any] = []
    examples = []
    if options.texts is not None:
        texts = read_rows(Source(options.texts, f"--texts {options.texts}", column=options.column, settings="--"))
        if options.budget is not None:
            require(len(texts) > 1, "--texts", "two texts or more, so that there is an interval", f"{len(texts)} text")
    if options.task_file is not None:
        examples = read_examples(options.task_file)
    if not texts and not examples:
        return None
    device, dtype = measuring_device(options.device, options.dtype)
    model = _load(line, base, dtype, device)
    tokenizer = load_tokenizer(_with_tokenizer(line.tuned.name, base), option="TUNED")
    return Walk(line, model, tokenizer, Measured(texts, examples, options.max_length))


def _load(line: Line, base: str | None, dtype: str, device: torch.device) -> Any:
    """Load the tuned model, or the base model with the tuned adapter on it."""
    if not line.tuned.is_adapter:
        return load_model(line.tuned.name, dtype, device, option="TUNED")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPackageError(
            "An adapter is to be measured, and the package for it cannot be imported.",
            where=line.tuned.name,
            expected="package peft",
            found=error,
            fix='pip install "gere[peft]"',
        ) from error
    model = load_model(str(base), dtype, device, option="--base")
    if line.grown:
        model.resize_token_embeddings(max(line.grown.values()), mean_resizing=False)
    return PeftModel.from_pretrained(model, line.tuned.name)


def _with_tokenizer(tuned: str, base: str | None) -> str:
    """Return the tuned folder if it has a tokenizer, else the base."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if base is None or any((Path(tuned) / name).is_file() for name in names):
        return tuned
    return base


def _measure(walk: Walk, options: argparse.Namespace) -> Point:
    """Measure the line, show it, and choose a share of it."""
    points: list[Point] = []
    _say(_header(options))

    def show(share: float) -> Point:
        point = walk.at(share)
        if point not in points:
            points.append(point)
            _say(_row(point))
        return point

    def general(share: float) -> GeneralChange:
        found = show(share).general
        assert found is not None  # noqa: S101 (a budget needs texts)
        return found

    shares = grid(options.points)
    for share in shares:
        show(share)
    point = points[0]
    if options.share is not None:
        point = show(options.share)
    elif options.best:
        point = choose(points, options.budget, by_task=True)
    elif options.budget is not None:
        point = walk.at(largest_within(general, options.budget, shares)[0])
    if options.plot is not None:
        draw(sorted(points), point.share if options.out else None, options.plot)
        _say(f"wrote {options.plot}")
    if options.out is not None:
        require_finite(point)
        _say(_answer(point, options))
    return point


def _header(options: argparse.Namespace) -> str:
    general = "  general loss    general change" if options.texts is not None else ""
    return f"share{general}{'  task loss' if options.task_file is not None else ''}"


def _row(point: Point) -> str:
    cells = [f"{point.share:5.2f}"]
    if point.general is not None:
        cells.append(f"{point.general.loss:12.4f}  {_signed(point.general):>16}")
    if point.task_loss is not None:
        cells.append(f"{point.task_loss:9.4f}")
    return "  ".join(cells)


def _signed(general: GeneralChange) -> str:
    return f"{general.change:+.4f} ± {general.interval:.4f}"


def _answer(point: Point, options: argparse.Namespace) -> str:
    parts = [f"share {point.share:g}"]
    if point.general is not None:
        parts.append(f"general change {_signed(point.general)} nats over {point.general.texts} texts")
    if options.budget is not None:
        parts.append(f"within the budget of {options.budget:g}")
    if point.task_loss is not None:
        parts.append(f"task loss {point.task_loss:.4f}")
    return ", ".join(parts)


def _about(point: Point, base: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Say what `gere_blend.json` has beside the share."""
    about: dict[str, Any] = {"base": base}
    if options.budget is not None:
        about["budget"] = options.budget
    if point.general is not None:
        interval = point.general.interval
        about["general"] = {
            "loss": point.general.loss,
            "change": point.general.change,
            # JSON has no NaN, which is the interval of a single text.
            "interval": interval if math.isfinite(interval) else None,
            "texts": point.general.texts,
        }
    if point.task_loss is not None:
        about["task_loss"] = point.task_loss
    return about


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.flush()
