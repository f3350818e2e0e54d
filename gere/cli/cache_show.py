"""`gere cache info` and `gere cache verify`: what is in a cache folder, and whether it is whole."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gere.cache.inventory import describe, pick, size_of, survey
from gere.cache.resolve import open_whole
from gere.errors import CacheError


def info(folder: Path, *, as_json: bool) -> int:
    """Write what a cache folder holds.

    Args:
        folder: Cache folder, or the folder of one anchor.
        as_json: Write one JSON object, digests whole.

    Returns:
        The exit status: 1 if a manifest cannot be read.
    """
    held = describe(survey(folder))
    text = json.dumps(held, indent=1, ensure_ascii=False) if as_json else "\n".join(_lines(held))
    sys.stdout.write(text + "\n")
    return int(any("error" in anchor for anchor in held["anchors"]))


def verify(folder: Path, key: str | None) -> int:
    """Hash every file of every anchor, and say which are whole.

    Args:
        folder: Cache folder, or the folder of one anchor.
        key: Look at this anchor alone.

    Returns:
        The exit status: 1 if an anchor is damaged.
    """
    held = survey(folder)
    damaged = 0
    for path in held.anchors if key is None else [pick(held, key)]:
        try:
            open_whole(path)
        except CacheError as error:
            damaged += 1
            sys.stdout.write(f"DAMAGED  {path.name}\n{_indented(str(error))}\n")
        else:
            sys.stdout.write(f"OK       {path.name}  {megabytes(size_of(path))}\n")
    if not held.anchors:
        sys.stdout.write("no finished anchor\n")
    return int(damaged > 0)


def anchor_lines(anchor: Mapping[str, Any]) -> Iterator[str]:
    """What `describe_anchor` gives, for a person: one thing a line, digests by their beginning."""
    if "error" in anchor:
        yield _indented(anchor["error"])
    else:
        yield f"  {anchor['rows']:,} rows, {anchor['tokens']:,} tokens, dim {anchor['dim']:,}"
        yield from (f"  {name:<14}{short_digests(value)}" for name, value in anchor["fields"].items())
    sizes = dict(anchor["bytes"])
    total = megabytes(sizes.pop("total"))
    yield f"  {'on disk':<14}{total}: " + ", ".join(f"{kind} {megabytes(size)}" for kind, size in sizes.items())


def megabytes(size: int) -> str:
    """A number of bytes for a person."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def short_digests(value: str) -> str:
    """A field of an anchor with the beginning of each digest in it."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", value)


def _lines(held: Mapping[str, Any]) -> Iterator[str]:
    for anchor in held["anchors"]:
        yield f"anchor {anchor['key']}"
        yield from anchor_lines(anchor)
    for build in held["unfinished"]:
        far = "all evaluated" if build["all_evaluated"] else f"{build['rows']:,} rows in {build['parts']} parts"
        yield f"unfinished {build['key']}: {far}, {megabytes(build['bytes'])}"
    for kind, title in (("replay_files", "kept texts"), ("leftovers", "leftover")):
        yield from (f"{title} {item['name']}, {megabytes(item['bytes'])}" for item in held[kind])
    if not any(held[kind] for kind in ("anchors", "unfinished", "replay_files", "leftovers")):
        yield "empty"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
