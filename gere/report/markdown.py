"""A table as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of a head and rows, every cell shown as it is.

    Args:
        rows: The head, and rows of as many cells.

    Returns:
        Lines of Markdown, the last with its end.
    """
    head, *body = ([_escaped(cell) for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    """A cell without marks of Markdown or HTML in it; underscores within a word are none."""
    plain = html.escape(" ".join(cell.split()), quote=False)
    return re.sub(r"([\\`*|\[\]])", r"\\\1", plain)
