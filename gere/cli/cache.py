"""The words and options of `gere cache`. The modules that do the work are imported when a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gere.cli.settings import settings_help
from gere.config import DTYPES

ABOUT_GC = (
    "List, and with --yes remove: anchors that no run under the folders of --runs names, unfinished builds, what "
    "killed runs left, and kept texts that no anchor is made from. A training names its anchor in its output folder "
    "as soon as it begins."
)


def add_cache(commands: Any) -> None:
    """Add `cache` and its commands to the parser of `gere`."""
    parser = commands.add_parser("cache", help="build, show, verify and clean up anchors")
    parts = parser.add_subparsers(dest="cache_command", required=True, metavar="COMMAND")
    _add_build(parts)
    info = _add(parts, "info", "show the anchors of a folder, without hashing them")
    info.add_argument("--json", action="store_true", help="write one JSON object")
    verify = _add(parts, "verify", "hash every file of every anchor; status 1 if one is damaged")
    verify.add_argument("key", nargs="?", metavar="KEY", help="this anchor alone")
    gc = _add(parts, "gc", "list or remove what no run needs", description=ABOUT_GC)
    gc.add_argument("--runs", nargs="+", type=Path, metavar="OUT", help="output folders whose anchors stay")
    gc.add_argument("--keep", nargs="+", default=[], metavar="KEY", help="further anchors that stay")
    gc.add_argument("--yes", action="store_true", help="remove what is listed")


def _add(parts: Any, name: str, text: str, **settings: Any) -> argparse.ArgumentParser:
    parser = parts.add_parser(name, help=text, **{"description": text.capitalize() + ".", **settings})
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the gere_hidden_state_saving_dir")
    parser.set_defaults(run=_run)
    return parser


def _add_build(parts: Any) -> None:
    build = _add(
        parts,
        "build",
        "build the anchor of a base model ahead of training",
        # argparse formats it with `%`.
        epilog=f"settings and defaults (the training must have the same):\n{settings_help()}".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = build.add_argument
    add("--model", required=True, metavar="M", help="folder or hub name of the base model")
    add("--tokenizer", metavar="T", help="folder or hub name of the tokenizer; the model's own by default")
    add("--pad-token", metavar="TOKEN", help="set the padding token, as a training script does")
    add("--config", type=Path, metavar="FILE", help="YAML or JSON with replay settings, alone or in a section gere")
    add("--replay-dataset", metavar="R", help="short for --set replay_dataset=R")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; overrules FILE")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision of the training")
    add("--dtype", choices=DTYPES, help="dtype of the weights; by default what from_pretrained gives")
    add("--tf32", action="store_true", help="the training sets tf32=True")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: as the training chooses it")


def _run(options: argparse.Namespace) -> int:
    if options.cache_command == "build":
        from gere.cli.cache_build import build

        return build(options)
    from gere.cli import cache_folder

    if options.cache_command == "info":
        return cache_folder.info(options.folder, as_json=options.json)
    if options.cache_command == "verify":
        return cache_folder.verify(options.folder, options.key)
    return cache_folder.clean_up(options.folder, options.runs, options.keep, delete=options.yes)
