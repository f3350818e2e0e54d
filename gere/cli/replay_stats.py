"""Statistics of replay texts: lengths, repeats, loops and sources."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere.config import GeReConfig
from gere.errors import ReplaySetError
from gere.replay.rows import adds_bos, private_copy
from gere.replay.sieve import caseless, is_loop
from gere.replay.texts import SUFFIXES, read_file


class Record(NamedTuple):
    """A text and where it comes from."""

    text: str
    source: str


def sources_of(name: str, texts: Sequence[str]) -> list[str]:
    """Name the source of each text: the field `source` of its record if all records of the file have one, else `name`.

    `name` is the source of the command line, and `texts` are its first texts.
    """
    path = Path(name)
    if path.suffix in SUFFIXES and path.is_file():
        # Most files have no such field.
        try:
            named = read_file(path, "source")[: len(texts)]
        except ReplaySetError:
            named = []
        # A file of bare strings returns these for any column.
        if named and all(isinstance(source, str) and source for source in named) and named != list(texts):
            return named
    return [name] * len(texts)


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
        unit, pieces = "tokens", _rows(texts, tokenizer, config)
    lines.append((unit, _spread(pieces)))
    if tokenizer is not None:
        cut = sum(len(row) > config.max_length for row in pieces)
        lines.append(("cut", f"{cut:,} texts longer than {config.max_length} tokens"))
    lines += [
        ("repeated", f"{exact:,} texts, of which a file gets the first one"),
        ("near repeats", f"{near - exact:,} more, but for case and spaces"),
        ("loops", f"{sum(map(is_loop, pieces)):,} texts, of whose runs of four {unit} under half are different"),
    ]
    for source, count in Counter(record.source for record in records).most_common():
        lines.append(("source", f"{source}: {count:,} texts, {count / len(texts):.1%}"))
    return "".join(f"{name:<13}{value}\n" for name, value in lines)


def _rows(texts: Sequence[str], tokenizer: Any, config: GeReConfig) -> list[list[int]]:
    """Tokenise whole texts, with the BOS that a replay row has."""
    private = private_copy(tokenizer)
    # `tokenize` would cut them at `max_length`, and the report tells how many are longer.
    encoded = private(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    first = [tokenizer.bos_token_id] if adds_bos(private, config) else []
    return [first + list(ids) for ids in encoded]


def _spread(items: Sequence[Any]) -> str:
    """Show the sum of the lengths of some items, and how these are spread."""
    sizes = list(map(len, items))
    total, middle, mean = sum(sizes), statistics.median(sizes), statistics.fmean(sizes)
    return f"{total:,} (of a text: min {min(sizes):,}, median {middle:,.0f}, mean {mean:,.0f}, max {max(sizes):,})"
