"""Rows that are kept in a file: those of the hub, and texts that the base model wrote."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gere._files import make_folder, read_lines, write_atomic
from gere.cache.fingerprint import text_digest
from gere.errors import CacheCorruptError
from gere.replay.forms import OPTIONS

CHAT_FIELDS = ("messages", *OPTIONS, "prompt", "completion")


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all, and make the folder."""
    make_folder(path.parent)
    write_atomic(path, json_lines(records))


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return records as JSON lines."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    # A text may hold half of a surrogate pair, which strict UTF-8 refuses.
    return "".join(lines).encode("utf-8", "surrogatepass")


def write_kept(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Keep rows in a cache folder: JSON lines, each with `about`, the first of them with a digest of all rows."""
    records = [{**row, **about} for row in rows]
    records[0]["sha256"] = text_digest(map(_content, rows))
    write_records(path, records)


def _content(record: Mapping[str, Any]) -> str:
    """Return what the digest of kept rows is made from: the text of a row, or its other fields as JSON."""
    if "text" in record:
        return str(record["text"])
    return json.dumps({name: record[name] for name in CHAT_FIELDS if name in record}, sort_keys=True)


def _is_kept(record: Mapping[str, Any]) -> bool:
    if "text" in record:
        return isinstance(record["text"], str)
    return any(name in record for name in CHAT_FIELDS)


def read_kept(path: Path, size: int, fix: str) -> list[dict[str, Any]]:
    """Read the rows that `write_kept` wrote.

    Args:
        path: The file.
        size: Number of rows that it must have.
        fix: What to do about a damaged file.

    Raises:
        CacheCorruptError: If they are not those that were written.
    """
    try:
        # Of use again: a start that has read them may be on its way to an anchor that is made from them.
        with contextlib.suppress(OSError):
            path.touch()
        records = list(read_lines(path))
        if not all(isinstance(record, dict) and _is_kept(record) for record in records):
            raise TypeError("a row without a text")
        if len(records) != size:
            raise ValueError(f"{len(records)} texts")
        digest = text_digest(map(_content, records))
        # Files from before version 0.2 have no digest.
        if records[0].get("sha256", digest) != digest:
            raise ValueError(f"texts with SHA-256 {digest}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheCorruptError(
            "The kept replay texts are damaged.",
            where=path,
            expected=f"{size} lines as they were written, each a JSON object",
            found=f"{type(error).__name__}: {error}",
            fix=fix,
        ) from error
    return records
