"""Read the command line and call the command. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from gere.cli.blend import add_blend
from gere.cli.cache import add_cache
from gere.cli.replay import add_replay
from gere.cli.report import add_report
from gere.cli.sequence import add_sequence
from gere.errors import GeReError


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    text = "Replay files, anchors, reports and blends for training with gere."
    parser = argparse.ArgumentParser(prog="gere", description=text)
    parser.add_argument("--version", action="version", version=f"gere {version('gere')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in (add_cache, add_replay, add_sequence, add_report, add_blend):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gere`.

    Args:
        arguments: Words of the command line; `None` for those of this process.

    Returns:
        The exit status: 0, or 1 after an error of this library, which is shown without a traceback; 128 and the number
        of the signal after Ctrl-C or SIGTERM.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        with _stoppable():
            return options.run(options)
    except GeReError as error:
        sys.stderr.write(f"gere: {type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        sys.stderr.write(f"\ngere: stopped by {signal.Signals(number).name}\n")
        return 128 + int(number)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that temporary files and locks go; never in another thread."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    here = threading.current_thread() is threading.main_thread()
    # A handler of the caller stays.
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
