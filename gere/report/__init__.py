"""The report of finished and half-done runs: a page to look at and a table to quote."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gere.report.figures import group, table
from gere.report.page import page
from gere.report.reading import read_runs


class Report(NamedTuple):
    """A report of runs.

    Attributes:
        html: One page that loads nothing.
        markdown: Table of the means over seeds with their 95 % intervals.
    """

    html: str
    markdown: str


def make_report(folders: Sequence[Path]) -> Report:
    """Report on run folders; the same files give the same bytes.

    Args:
        folders: Folders of `gere sequence`, output folders of a `Trainer`, or both; at least one.

    Raises:
        ConfigError: If a folder is named twice.
        RunFolderError: If a folder is no run, or a file of it is damaged.
        MissingPackageError: If a run has something to draw and matplotlib is not installed.
    """
    groups = group(read_runs(folders))
    return Report(_writable(page(groups)), _writable(_markdown(table(groups))))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write head and rows as a table of Markdown; every cell is shown as it is."""
    lines = [[_escaped(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    # Underscores stay: within a word they are no mark of Markdown.
    plain = html.escape(" ".join(cell.split()), quote=False)
    return re.sub(r"([\\`*|\[\]])", r"\\\1", plain)


def _writable(text: str) -> str:
    # A name in JSON may hold half of a surrogate pair, which UTF-8 does not have.
    return text.encode("utf-8", "replace").decode("utf-8")
