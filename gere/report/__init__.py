"""The report of finished and half-done runs: a page to look at and a table to quote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gere.report.figures import group, table
from gere.report.markdown import markdown_table
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
    """Read run folders, and report on them; the same files give the same bytes.

    Args:
        folders: Folders of `gere sequence`, output folders of a `Trainer`, or both; at least one.

    Raises:
        ConfigError: If a folder is named twice.
        RunFolderError: If a folder is no run, or a file of it is damaged.
    """
    runs = read_runs(folders)
    return Report(_writable(page(runs)), _writable(markdown_table(table(group(runs)))))


def _writable(text: str) -> str:
    """Text with a question mark for what UTF-8 does not have: half of a surrogate pair, as names may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
