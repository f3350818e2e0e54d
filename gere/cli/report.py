"""`gere report`: a page and a table of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gere._files import write_whole
from gere.cli.settings import output_errors
from gere.config import require


def add_report(commands: Any) -> None:
    """Add the command `report` to those of `gere`."""
    text = "Write one HTML page with the plots and figures of runs, and show their means over seeds as Markdown."
    parser = commands.add_parser("report", help=text, description=text)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of gere sequence, or output folder of a Trainer")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="the page [report.html]")
    add("--markdown", type=Path, metavar="FILE.md", help="write the table there, too")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    for name, path, end in (("--out", options.out, ".html"), ("--markdown", options.markdown, ".md")):
        require(path is None or path.suffix == end, name, f"a file name that ends in {end}", str(path))
    # Takes its time to import, so after the checks.
    from gere.report import make_report

    report = make_report(options.runs)
    _write(options.out, report.html, "--out")
    if options.markdown is not None:
        _write(options.markdown, report.markdown, "--markdown")
    sys.stdout.write(f"{report.markdown}\nwrote {options.out}\n")
    return 0


def _write(path: Path, text: str, option: str) -> None:
    """Write a page whole or not at all; into what is no regular file, such as `/dev/stdout`, as it is."""
    with output_errors(path, "The report", option):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(text.encode("utf-8"))
        else:
            write_whole(path.resolve(), text.encode("utf-8"))
