"""Statistics of replay texts: lengths, repeats, loops and sources."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from gere.config import GeReConfig
from gere.replay.forms import TEXT, Row, Templated
from gere.replay.rows import token_rows
from gere.replay.sieve import caseless, is_loop

SHOWN = 200  # characters


class Record(NamedTuple):
    """A text, where it comes from, and the row that it was read from."""

    text: str
    source: str
    row: Row = Row("", TEXT)


def without_repeats(records: Sequence[Record]) -> list[Record]:
    """Drop the records whose text came before."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.text, record)
    return list(first.values())


def describe(records: Sequence[Record], tokenizer: Any, config: GeReConfig) -> str:
    """Report on texts and their repeats, in lines of a name and a value.

    `tokenizer` counts tokens, by `max_length` and `add_bos` of `config`; `None` counts words.
    """
    texts = [record.text for record in records]
    near = len(texts) - len(set(map(caseless, texts)))
    exact = len(texts) - len(set(texts))
    lines = [("texts", f"{len(texts):,}"), ("characters", _spread(texts))]
    unit = "words"
    pieces: list[Any] = [text.split() for text in texts]
    if tokenizer is not None:
        unit, pieces = "tokens", token_rows(texts, tokenizer, sys.maxsize, config.add_bos)
    lines.append((unit, _spread(pieces)))
    if tokenizer is not None:
        cut = sum(len(row) > config.max_length for row in pieces)
        lines.append(("cut", f"{cut:,} texts longer than {config.max_length} tokens"))
    lines += [
        ("repeated", f"{exact:,} texts, of which a file gets the first one"),
        ("near repeats", f"{near - exact:,} more, but for case and spaces"),
        ("loops", f"{sum(map(is_loop, pieces)):,} texts, of whose runs of four {unit} under half are different"),
    ]
    lines += _forms(records)
    for source, count in Counter(record.source for record in records).most_common():
        lines.append(("source", f"{source}: {count:,} texts, {count / len(texts):.1%}"))
    return "".join(f"{name:<13}{value}\n" for name, value in lines)


def _forms(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Say how the rows of each form were read, and show the first one, unless all are plain texts."""
    lines = []
    for form, count in Counter(record.row.form for record in records).items():
        text = next(record.text for record in records if record.row.form == form)
        how = "joined"
        if form == TEXT:
            how = "as they are"
        elif isinstance(text, Templated):
            how = "by the chat template"
        lines.append(("form", f"{form}: {count:,} texts, {how}, such as {text[:SHOWN]!r}"))
    return lines


def _spread(items: Sequence[Any]) -> str:
    """Show the sum of the lengths of some items, and how these are spread."""
    sizes = list(map(len, items))
    total, middle, mean = sum(sizes), statistics.median(sizes), statistics.fmean(sizes)
    return f"{total:,} (of a text: min {min(sizes):,}, median {middle:,.0f}, mean {mean:,.0f}, max {max(sizes):,})"
