"""The rows of a file, whatever its format: one after the other, each with its place for messages."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from gere._files import MARK, numbered_lines, open_text
from gere._log import logger
from gere.errors import GeReError

T = TypeVar("T")
PACKED = (".gz", ".bz2", ".xz", ".zst")
CHUNK = 1 << 16  # characters
BATCH = 256  # rows of a Parquet file
LONGEST_CELL = 2**31 - 1
HALVES = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """A row as it stands in its source.

    Attributes:
        holder: The file, or the name of what holds it.
        place: Where it is there: `"line 7"` of a file, from 1; `"row 6"` of a table or `"item 6"` of a list, from 0.
        value: A text, a mapping, or whatever else is there.
    """

    holder: str
    place: str
    value: Any

    @property
    def where(self) -> str:
        """The place of the row for a message."""
        return f"{self.holder}, {self.place}"


def kind_of(path: Path) -> str:
    """Return the suffix of a file without that of a packed one, such as `".jsonl"` for `texts.jsonl.gz`."""
    if path.suffix.lower() in PACKED:
        path = path.with_suffix("")
    return path.suffix.lower()


def read_records(path: Path, error: type[GeReError], setting: str) -> Iterator[Record]:
    """Yield the rows of a file, and read no more of it than is asked for.

    Args:
        path: JSON lines (.jsonl, .ndjson, .json), a JSON list (.json), a table with a header (.csv, .tsv, .parquet) or
            a text a line (.txt); each but .parquet also packed (.gz, .bz2, .xz; .zst with the package zstandard).
        error: Class of the error for a file that cannot be read.
        setting: What names the file, for the error.
    """
    try:
        kind = kind_of(path)
        if kind not in FORMATS:
            raise ValueError(f"a file of kind {path.suffix or path.name!r}")
        if path.suffix.lower() == ".zst":
            importlib.import_module("zstandard")
        for place, value in FORMATS[kind](path):
            yield Record(str(path), place, value)
    except Exception as caught:  # packers and pyarrow have errors of their own
        raise error(
            "A file of rows cannot be read.",
            where=setting if str(path) in setting else f"{setting}, {path}",
            expected=f"rows, in UTF-8: {', '.join(FORMATS)}, packed ({', '.join(PACKED)}) or not",
            found=f"{type(caught).__name__}: {caught}",
            fix="Correct the path or the file. Several files are a list of paths, or a pattern such as texts/*.jsonl.",
        ) from caught


def take(
    records: Iterable[Record],
    make: Callable[[Record], T | None],
    *,
    size: int | None = None,
    error: type[GeReError],
    expected: str,
) -> list[T]:
    """Make the first `size` rows that are not empty, or all, and say in the log what was left out or mended.

    Args:
        records: Rows as they stand in their source.
        make: Makes a row; `None` of an empty one. A `ValueError` says why it cannot.
        size: Rows to make; `None` for all.
        error: Class of the error for a row that cannot be made.
        expected: What a row should be, for the error.
    """
    made: list[T] = []
    empty: list[str] = []
    mended: list[str] = []
    for record in records:
        whole = record._replace(value=mend(record.value))
        if whole.value is not record.value:
            mended.append(record.where)
        try:
            row = make(whole)
        except GeReError:
            raise
        except ValueError as caught:
            raise error(
                "A row cannot be used.",
                where=record.where,
                expected=expected,
                found=str(caught),
                fix="Correct or drop the row.",
            ) from caught
        if row is None:
            empty.append(record.where)
            continue
        made.append(row)
        if len(made) == size:
            break
    read = len(made) + len(empty)
    if empty:
        logger.warning("%d of %d rows are empty, and left out: %s.", len(empty), read, few(empty))
    if mended:
        what = "%d of %d rows lose byte order marks, or get U+FFFD for half a surrogate pair: %s."
        logger.warning(what, len(mended), read, few(mended))
    return made


def few(places: list[str]) -> str:
    """List the first three of some places."""
    shown = "; ".join(places[:3])
    return f"{shown}; and {len(places) - 3} more" if len(places) > 3 else shown


def mend(value: Any) -> Any:
    r"""Drop the byte order mark before a text, and read half a surrogate pair, which is no character, as U+FFFD.

    Texts inside of lists and mappings are mended, too. A value with nothing to mend is returned itself.

    Example:
        >>> ascii(mend(["\ufeffa", "\ud83d b"]))
        "['a', '\\ufffd b']"
    """
    if isinstance(value, str):
        if value.isascii() or not (value.startswith(MARK) or HALVES.search(value)):
            return value
        return value.removeprefix(MARK).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    parts: Any = None
    if isinstance(value, dict):
        parts = {name: mend(part) for name, part in value.items()}
        return parts if any(parts[name] is not value[name] for name in parts) else value
    if isinstance(value, list):
        parts = [mend(part) for part in value]
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return value


def blank(value: Any) -> bool:
    """Return whether there is nothing in a value: null, or texts of white space alone."""
    if isinstance(value, dict):
        return all(map(blank, value.values()))
    if isinstance(value, list | tuple):
        return all(map(blank, value))
    return value is None or (isinstance(value, str) and not value.strip())


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, value in numbered_lines(path):
        yield f"line {number}", value


def _texts(path: Path) -> Iterator[tuple[str, Any]]:
    # `splitlines` would also split at characters inside of a text, such as U+2028.
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", line.rstrip("\r\n")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON list, or values that stand one after the other."""
    with open_text(path) as stream:
        yield from _Values(stream)


class _Values:
    """JSON values of a stream, read as far as they are asked for, with the lines that they begin in."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._at, self._line = stream, "", 0, 1
        self._chunk, self._over = CHUNK, False

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        listed = self._next() == "["
        self._at += listed
        while (first := self._next(", " if listed else " ")) and not (listed and first == "]"):
            yield f"line {self._line}", self._value()
        if not listed:
            return
        self._at += 1
        if not first or self._next():
            fault = "there is more behind the list" if first else "the list does not end"
            raise ValueError(f"line {self._line} of the file: {fault}")

    def _next(self, skipped: str = " ") -> str:
        """Return the next character that is no white space, and stay at it; `""` at the end."""
        while True:
            while self._at < len(self._text):
                letter = self._text[self._at]
                if letter not in f"{skipped}\t\r\n{MARK}":
                    return letter
                self._line += letter == "\n"
                self._at += 1
            if self._over:
                return ""
            self._read()

    def _value(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._over:
                    line = self._line + self._text.count("\n", self._at, getattr(error, "pos", self._at))
                    raise ValueError(f"line {line} of the file: {error}") from error
                end = len(self._text)
            # A number may go on in the next chunk.
            if end < len(self._text) or self._over:
                break
            self._read()
        self._line += self._text.count("\n", self._at, end)
        self._at = end
        self._chunk = CHUNK
        return value

    def _read(self) -> None:
        """Read on, twice as far with each failure, so that a long value is not decoded from its start too often."""
        more = self._stream.read(self._chunk)
        self._text, self._at = self._text[self._at :] + more, 0
        self._chunk, self._over = 2 * self._chunk, not more


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    longest = csv.field_size_limit(LONGEST_CELL)  # 128 kB otherwise, and documents are longer
    try:
        with open_text(path, newline="") as stream:
            rows = csv.DictReader(stream, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
            for row in rows:
                # Cells may hold line breaks, and the number is that of the last line.
                line = rows.line_num - "".join(map(str, row.values())).count("\n")
                if None in row:
                    raise ValueError(f"line {line} of the file: more cells than the header has")
                yield f"line {line}", row
    finally:
        csv.field_size_limit(longest)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=BATCH):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1


FORMATS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": _texts,
}
