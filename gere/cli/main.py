"""Reads the command line and calls the command; each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gere.cli import COMMANDS
from gere.errors import GeReError


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="gere", description="Replay files, anchors and reports for training with gere."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_parser in COMMANDS:
        add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gere`.

    Args:
        arguments: Words of the command line; `None` for those of this process.

    Returns:
        The exit status: 0, or 1 after an error of this library, which is shown without a traceback.
    """
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options)
    except GeReError as error:
        sys.stderr.write(f"gere: {type(error).__name__}: {error}\n")
        return 1
