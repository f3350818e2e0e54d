"""`gere cache info`, `verify` and `gc`: show what a cache folder holds, check it, and clean it up."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gere.cache.gc import collect
from gere.cache.inventory import describe, pick, size_of, survey
from gere.cache.resolve import open_whole
from gere.errors import CacheError
from gere.session.checkpoint import keys_in_runs

NO_RUNS = "Finished anchors stay, since no runs are given: --runs OUT removes those that no run under OUT names."


def info(folder: Path, *, as_json: bool) -> int:
    """Write what a cache folder holds.

    Args:
        folder: Cache folder, or the folder of one anchor.
        as_json: Write one JSON object with whole digests.

    Returns:
        The exit status: 1 if a manifest cannot be read.
    """
    held = describe(survey(folder))
    text = json.dumps(held, indent=1, ensure_ascii=False) if as_json else "\n".join(_lines(held))
    sys.stdout.write(text + "\n")
    return int(any("error" in anchor for anchor in held["anchors"]))


def verify(folder: Path, key: str | None) -> int:
    """Hash every file of every anchor, and say which anchors are whole.

    Args:
        folder: Cache folder, or the folder of one anchor.
        key: Verify this anchor alone.

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
            sys.stdout.write(f"OK       {path.name}  {_megabytes(size_of(path))}\n")
    if not held.anchors:
        sys.stdout.write("no finished anchor\n")
    return int(damaged > 0)


def clean_up(folder: Path, runs: Sequence[Path] | None, keep: Sequence[str], *, delete: bool) -> int:
    """Write what no run needs, and remove it if asked to.

    Args:
        folder: Cache folder.
        runs: Output folders of runs; `None` keeps every finished anchor.
        keep: Keys of further anchors that stay.
        delete: Remove what is found.

    Returns:
        The exit status, 0.
    """
    named = None if runs is None else keys_in_runs(runs)
    rubbish = collect(folder, named, keep, delete=delete)
    lines = [f"{_megabytes(item.size):>12}  {item.path.relative_to(folder)}  ({item.why})" for item in rubbish]
    if rubbish:
        done = "Removed:" if delete else "To remove them, give --yes:"
        lines.append(f"{done} {len(rubbish)} of them, {_megabytes(sum(item.size for item in rubbish))}.")
    else:
        lines.append("Nothing to remove.")
    lines.append(NO_RUNS if named is None else f"Runs name {len(named)} anchors.")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def anchor_lines(anchor: Mapping[str, Any]) -> Iterator[str]:
    """Describe an anchor to a person, one fact a line; digests are shortened.

    Args:
        anchor: As `gere.cache.inventory.describe_anchor` gives it.
    """
    if "error" in anchor:
        yield _indented(anchor["error"])
    else:
        yield f"  {anchor['rows']:,} rows, {anchor['tokens']:,} tokens, dim {anchor['dim']:,}"
        for name, value in anchor["fields"].items():
            yield f"  {name:<14}" + re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", value)
    sizes = dict(anchor["bytes"])
    total = _megabytes(sizes.pop("total"))
    yield f"  {'on disk':<14}{total}: " + ", ".join(f"{kind} {_megabytes(size)}" for kind, size in sizes.items())


def _lines(held: Mapping[str, Any]) -> Iterator[str]:
    for anchor in held["anchors"]:
        yield f"anchor {anchor['key']}"
        yield from anchor_lines(anchor)
    for build in held["unfinished"]:
        far = "all evaluated" if build["all_evaluated"] else f"{build['rows']:,} rows in {build['parts']} parts"
        yield f"unfinished {build['key']}: {far}, {_megabytes(build['bytes'])}"
    for kind, title in (("replay_files", "kept texts"), ("leftovers", "leftover")):
        for item in held[kind]:
            yield f"{title} {item['name']}, {_megabytes(item['bytes'])}"
    if not any(held[kind] for kind in ("anchors", "unfinished", "replay_files", "leftovers")):
        yield "empty"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
