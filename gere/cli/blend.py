"""The words and options of `gere blend`. The module that does the work is imported when the command runs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from gere.config import DTYPES, require
from gere.errors import ConfigError

ABOUT = (
    "Form weights on the straight line from base to tuned: base + share * (tuned - base). Measure the line on general "
    "texts and on the task, and take the share that fits a budget of forgetting."
)
PLOTS = (".svg", ".png")


def add_blend(commands: Any) -> None:
    """Add the command `blend` to those of `gere`."""
    parser = commands.add_parser("blend", help="move a tuned model back towards its base", description=ABOUT)
    add = parser.add_argument
    add("tuned", type=Path, metavar="TUNED", help="folder of a saved model or of a LoRA adapter, from any tool")
    add("--base", metavar="B", help="folder or hub name of the base model (default: what TUNED names)")
    add("--share", type=float, metavar="A", help="take this share: 1 is the tuned model, 0 the base")
    add(
        "--budget",
        type=float,
        metavar="NATS",
        help="take the largest share whose general change is surely within this",
    )
    add(
        "--best",
        action="store_true",
        help="take the share with the least task loss, within the budget if one is given",
    )
    add("--texts", metavar="F", help="general texts that nobody trained on, a file: measure the line on them")
    add("--column", default="text", help="column or JSON key of the texts [text]")
    add(
        "--task-file",
        type=Path,
        metavar="F.jsonl",
        help="task rows with instruction or input, and output: measure them",
    )
    add("--points", type=int, default=11, metavar="N", help="shares to measure, from 1 to 0 [11]")
    add("--max-length", type=int, default=512, metavar="T", help="tokens of a text or row that are read [512]")
    add("--plot", type=Path, metavar="F.svg", help="draw the line as .svg or .png")
    add("--device", help="where the model is measured (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="precision of measuring (default: float32 on a CPU, else that of the files)")
    add("--out", type=Path, metavar="OUT", help="folder to write; not needed to measure only")
    add("--force", action="store_true", help="replace a blend that is in OUT")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    _require_usable(options)
    # Imports torch and transformers, which a wrong word should not wait for.
    from gere.cli.blend_line import blend

    return blend(options)


def _require_usable(options: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    chosen = options.share is not None, options.budget is not None or options.best
    measures = options.texts is not None or options.task_file is not None
    require(not all(chosen), "--share", "one of --share, --budget and --best", "more of them")
    _needs(any(chosen) or measures, "--share", "--share A, or --texts F or --task-file F to measure the line")
    _needs(options.budget is None or options.texts is not None, "--budget", "--texts F beside it, to measure on")
    _needs(not options.best or options.task_file is not None, "--best", "--task-file F beside it, to measure on")
    _needs(options.plot is None or measures, "--plot", "--texts F or --task-file F beside it, to measure on")
    _needs(any(chosen) == (options.out is not None), "--out", "--out OUT together with --share, --budget or --best")
    if options.share is not None:
        require(0 <= options.share <= 1, "--share", "a number from 0, the base, to 1, the tuned model", options.share)
    if options.budget is not None:
        sound = 0 <= options.budget < math.inf
        require(sound, "--budget", "a general change in nats a token, 0 or more, such as 0.05", options.budget)
    require(options.points >= 2, "--points", "a whole number of at least 2", options.points)
    require(options.max_length >= 2, "--max-length", "a whole number of at least 2", options.max_length)
    if options.plot is not None:
        require(options.plot.suffix in PLOTS, "--plot", "a file name that ends in .svg or .png", str(options.plot))


def _needs(ok: bool, option: str, expected: str) -> None:
    if not ok:
        raise ConfigError(
            "The options do not go together.",
            where=option,
            expected=expected,
            found="one without the other",
            fix="See gere blend --help.",
        )
